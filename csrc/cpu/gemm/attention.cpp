#include "cpu/gemm/attention.h"

#include <algorithm>
#include <cstdint>

#include "cpu/isa/capability.h"

#define METAFAST_VARIANT "cpu/gemm/attention.inl"

namespace metafast {
namespace {

#include "cpu/isa/per_type_and_isa.inl"

}  // namespace

template <>
const Products<float>& products<float>() {
  return float32::widest_table();
}

template <>
const Products<double>& products<double>() {
  return float64::widest_table();
}

}  // namespace metafast
