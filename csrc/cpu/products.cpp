#include "cpu/products.h"

#include <algorithm>
#include <cstdint>

#include "cpu/capability.h"

#define METAFAST_VARIANT "cpu/products.inl"

namespace metafast {
namespace {

#include "cpu/both_types.inl"

}  // namespace

template <>
const Products<float>& products<float>() {
  return single::widest_table();
}

template <>
const Products<double>& products<double>() {
  return precise::widest_table();
}

}  // namespace metafast
