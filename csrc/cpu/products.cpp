#include "cpu/products.h"

#include <algorithm>
#include <cstdint>

#include "cpu/capability.h"

#define METAFAST_VARIANT "cpu/products.inl"

namespace metafast {
namespace {

#define REAL float
namespace single {
#include "cpu/variants.inl"
}
#undef REAL

#define REAL double
namespace precise {
#include "cpu/variants.inl"
}
#undef REAL

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
