#include "cpu/attention_rows.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/capability.h"

#define METAFAST_VARIANT "cpu/attention_rows.inl"

namespace metafast {
namespace {

#include "cpu/both_types.inl"

}  // namespace

template <>
const AttentionRows<float>& attention_rows<float>() {
  return single::widest_table();
}

template <>
const AttentionRows<double>& attention_rows<double>() {
  return precise::widest_table();
}

}  // namespace metafast
