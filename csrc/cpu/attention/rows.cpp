#include "cpu/attention/rows.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/isa/capability.h"

#define METAFAST_VARIANT "cpu/attention/rows.inl"

namespace metafast {
namespace {

#include "cpu/isa/per_type_and_isa.inl"

}  // namespace

template <>
const AttentionRows<float>& attention_rows<float>() {
  return float32::widest_table();
}

template <>
const AttentionRows<double>& attention_rows<double>() {
  return float64::widest_table();
}

}  // namespace metafast
