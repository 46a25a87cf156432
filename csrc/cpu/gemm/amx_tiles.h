// The matrix products of attention in bfloat16.
#pragma once

#include <cstdint>

#include "cpu/gemm/attention.h"

namespace metafast {

// The widest and the narrowest heads that they are for, and the most rows of a panel. Below half a block, packed factors would not
// fit where floats do.
constexpr int64_t tile_products_most_depth = 512, tile_products_least_depth = 16;

// None where the machine has no tile instructions, or was asked for less.
const Products<float>* tile_products();

}  // namespace metafast
