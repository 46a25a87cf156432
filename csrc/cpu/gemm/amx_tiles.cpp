// The matrix products of attention in bfloat16, by the tile instructions of x86 (AMX): factors are rounded to bfloat16, sums are
// in float32. Panels, outputs and what is given stay float32, so everything around the products is the same as for other types.
//
// A tile is 16 rows of 64 bytes. tdpbf16ps adds to a tile of [16, 16] sums the product of a left tile, [16 rows, 32 k], and a right
// tile, whose 16 rows are pairs of k: [k / 2][16 columns][2]. A right tile is a kilobyte of its own in both layouts:
// - blocks: [columns / 32][depth / 32][2 halves of the 32 columns], at block * depth floats a block of 32 columns,
// - slices: [depth / 32][rows / 32][2 halves of the slice], at block * block floats 32 rows,
// of which they fill half or less, so that panels find them where they would find floats.

#include "cpu/gemm/amx_tiles.h"

#include <algorithm>
#include <cstdint>

#include "cpu/isa/capability.h"

#ifdef METAFAST_HAS_TILES

// gcc's own headers of AVX-512 make values uninitialised on purpose and warn of it (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma,prefer-vector-width=512")

namespace metafast {
namespace {

constexpr int64_t block = 32, half = 16;
constexpr int64_t tile_bytes = 1024, row_bytes = 64;
// Bytes from one block of k to the next.
constexpr int64_t step_in_blocks = 2 * tile_bytes, step_in_slices = block * block * int64_t(sizeof(float));
constexpr int64_t most_terms = 2;
// The most that a left factor has to be multiplied with at a time: the depth of a head, a panel's rows, or some of its keys.
constexpr int64_t most_depth = tile_products_most_depth;

using Bfloat16 = uint16_t;
struct alignas(64) Left {
  Bfloat16 data[most_terms][block][most_depth];
};

int64_t blocks_of(int64_t size) { return (size + block - 1) / block; }

__mmask16 first_of_half(int64_t n) { return n >= half ? __mmask16(0xFFFF) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

// Assembly, as the compiler's own functions for tiles do not say that they read memory.
#define METAFAST_TILE_LOAD(TILE, FROM, STRIDE) asm volatile("tileloadd (%0,%1,1), %%tmm" #TILE ::"r"(FROM), "r"(int64_t(STRIDE)) : "memory")
#define METAFAST_TILE_STORE(TILE, TO, STRIDE) asm volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" ::"r"(TO), "r"(int64_t(STRIDE)) : "memory")
#define METAFAST_TILE_ZERO(TILE) asm volatile("tilezero %%tmm" #TILE ::)
#define METAFAST_TILE_MULTIPLY(SUM, LEFT, RIGHT) asm volatile("tdpbf16ps %%tmm" #RIGHT ", %%tmm" #LEFT ", %%tmm" #SUM ::)

// While it lives, all eight tiles of this thread are 16 rows of 64 bytes. Afterwards there are none, and none to be saved when
// the system switches threads.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease" ::); }
};

// Tiles 0 to 3, the sums of [32, 32], or of the first 16 rows alone.
void zero_sums() {
  METAFAST_TILE_ZERO(0);
  METAFAST_TILE_ZERO(1);
  METAFAST_TILE_ZERO(2);
  METAFAST_TILE_ZERO(3);
}

// sums += left [32, 32 blocks] times right tiles, two of them a block of k; without `two`, of the first 16 rows alone.
void add_products(bool two, const Bfloat16* left, int64_t blocks, const float* right_factor, int64_t right_step) {
  constexpr int64_t stride = most_depth * int64_t(sizeof(Bfloat16));
  const char *upper = reinterpret_cast<const char*>(left), *lower = upper + half * stride;
  const char* right = reinterpret_cast<const char*>(right_factor);
  for (int64_t k = 0; k < blocks; ++k, upper += row_bytes, lower += row_bytes, right += right_step) {
    METAFAST_TILE_LOAD(6, right, row_bytes);
    METAFAST_TILE_LOAD(4, upper, stride);
    METAFAST_TILE_LOAD(7, right + tile_bytes, row_bytes);
    METAFAST_TILE_MULTIPLY(0, 4, 6);
    METAFAST_TILE_MULTIPLY(1, 4, 7);
    if (!two) continue;
    METAFAST_TILE_LOAD(5, lower, stride);
    METAFAST_TILE_MULTIPLY(2, 5, 6);
    METAFAST_TILE_MULTIPLY(3, 5, 7);
  }
}

// to [rows, columns] = alpha sums, or to + that.
void give_sums(int64_t rows, int64_t columns, float alpha, bool accumulate, float* to, int64_t stride) {
  alignas(64) float sums[block][block];
  constexpr int64_t sums_stride = block * int64_t(sizeof(float));
  METAFAST_TILE_STORE(0, sums[0], sums_stride);
  METAFAST_TILE_STORE(1, sums[0] + half, sums_stride);
  if (rows > half) {
    METAFAST_TILE_STORE(2, sums[half], sums_stride);
    METAFAST_TILE_STORE(3, sums[half] + half, sums_stride);
  }
  const __m512 factor = _mm512_set1_ps(alpha);
  const __mmask16 first = first_of_half(columns), second = first_of_half(columns - half);
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    __m512 a = _mm512_mul_ps(factor, _mm512_load_ps(sums[r])), b = _mm512_mul_ps(factor, _mm512_load_ps(sums[r] + half));
    if (accumulate) {
      a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(first, to));
      b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(second, to + half));
    }
    _mm512_mask_storeu_ps(to, first, a);
    _mm512_mask_storeu_ps(to + half, second, b);
  }
}

// 32 floats, of which the first n are read and the others 0, rounded.
__m512i rounded(const float* from, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first_of_half(n), from), high = _mm512_maskz_loadu_ps(first_of_half(n - half), from + half);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// left = rows [count, depth], with zeros up to whole blocks of k. Rows that there are not stay as they are: nobody reads their sums.
void round_rows(int64_t count, int64_t depth, const float* rows, int64_t stride, Bfloat16 (*left)[most_depth]) {
  for (int64_t i = 0; i < count; ++i, rows += stride) {
    for (int64_t k = 0; k < depth; k += block) _mm512_store_si512(left[i] + k, rounded(rows + k, depth - k));
  }
}

// x becomes its transpose.
void transpose(__m512i (&x)[half]) {
  __m512i y[half];
#pragma GCC unroll 8
  for (int i = 0; i < half; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < half; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 b + c] has the columns c, 4 + c, 8 + c and 12 + c of the rows 4 b to 4 b + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), high = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xDD);
    const __m512i low2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88), high2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xDD);
    y[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    y[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < half; ++i) x[i] = y[i];
}

// Rows 2 p and 2 p + 1 of the first n rows [n, 16 columns], each pair of values side by side; zeros for rows that there are not.
__m512i rounded_pairs(int64_t pair, int64_t n, __mmask16 columns, const float* from, int64_t stride) {
  const float* row = from + 2 * pair * stride;
  const __m512 first = 2 * pair < n ? _mm512_maskz_loadu_ps(columns, row) : _mm512_setzero_ps();
  const __m512 second = 2 * pair + 1 < n ? _mm512_maskz_loadu_ps(columns, row + stride) : _mm512_setzero_ps();
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second)), 16);
  return _mm512_or_si512(low, high);
}

// left [32 columns, count rows] = the transpose of 32 of a panel's columns.
void round_columns(int64_t count, const float* x, int64_t stride, Bfloat16 (*left)[most_depth]) {
  for (int64_t k = 0; k < count; k += block) {
    for (int64_t j = 0; j < block; j += half) {
      __m512i pairs[half];
#pragma GCC unroll 16
      for (int p = 0; p < half; ++p) pairs[p] = rounded_pairs(p, count - k, 0xFFFF, x + k * stride + j, stride);
      transpose(pairs);
#pragma GCC unroll 16
      for (int c = 0; c < half; ++c) _mm512_store_si512(left[j + c] + k, pairs[c]);
    }
  }
}

void pack(int64_t columns, int64_t depth, const float* keys, int64_t stride, float* blocked) {
  for (int64_t j = 0; j < columns; j += block) {
    char* tile = reinterpret_cast<char*>(blocked + j * depth);
    for (int64_t k = 0; k < depth; k += block) {
      for (int64_t n = 0; n < block; n += half, tile += tile_bytes) {
        // Keys are rows of pairs of k; their transpose has a row a pair.
        __m512i rows[half];
#pragma GCC unroll 16
        for (int c = 0; c < half; ++c) {
          rows[c] = j + n + c < columns ? rounded(keys + (j + n + c) * stride + k, depth - k) : _mm512_setzero_si512();
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int p = 0; p < half; ++p) _mm512_store_si512(tile + p * row_bytes, rows[p]);
      }
    }
  }
}

void slice(int64_t rows, int64_t depth, const float* from, int64_t stride, float* slices, int64_t slice_size) {
  for (int64_t at = 0; at < depth; at += block, slices += slice_size) {
    for (int64_t i = 0; i < rows; i += block) {
      char* tile = reinterpret_cast<char*>(slices + i * block);
      for (int64_t n = 0; n < block; n += half, tile += tile_bytes) {
        const __mmask16 columns = first_of_half(depth - at - n);
        for (int64_t p = 0; p < half; ++p) {
          _mm512_store_si512(tile + p * row_bytes, rounded_pairs(p, rows - i, columns, from + i * stride + at + n, stride));
        }
      }
    }
  }
}

void outer(int64_t count, int64_t columns, int64_t depth, float alpha, int64_t terms, const Factors<float>* factors, float* x, int64_t stride) {
  const Tiles tiles;
  Left left;
  for (int64_t i = 0; i < count; i += block) {
    const int64_t n = std::min(block, count - i);
    for (int64_t t = 0; t < terms; ++t) round_rows(n, depth, factors[t].left + i * factors[t].left_stride, factors[t].left_stride, left.data[t]);
    for (int64_t j = 0; j < columns; j += block) {
      zero_sums();
      for (int64_t t = 0; t < terms; ++t) {
        add_products(n > half, left.data[t][0], blocks_of(depth), factors[t].right + j * depth, step_in_blocks);
      }
      give_sums(n, block, alpha, false, x + i * stride + j, stride);
    }
  }
}

void to_rows(int64_t count, int64_t columns, int64_t depth, float alpha, int64_t terms, const Factors<float>* factors, float* rows, int64_t row_stride) {
  const Tiles tiles;
  Left left;
  for (int64_t first = 0; first < columns; first += most_depth) {
    const int64_t keys = std::min(most_depth, columns - first);
    for (int64_t i = 0; i < count; i += block) {
      const int64_t n = std::min(block, count - i);
      for (int64_t t = 0; t < terms; ++t) round_rows(n, keys, factors[t].left + i * factors[t].left_stride + first, factors[t].left_stride, left.data[t]);
      for (int64_t at = 0; at < depth; at += block) {
        zero_sums();
        for (int64_t t = 0; t < terms; ++t) {
          const float* right = factors[t].right + at / block * factors[t].right_stride + first * block;
          add_products(n > half, left.data[t][0], blocks_of(keys), right, step_in_slices);
        }
        give_sums(n, std::min(block, depth - at), alpha, first > 0, rows + i * row_stride + at, row_stride);
      }
    }
  }
}

void to_keys(int64_t count, int64_t columns, int64_t depth, float alpha, int64_t terms, const Factors<float>* factors, bool accumulate, float* keys,
             int64_t key_stride) {
  const Tiles tiles;
  Left left;
  for (int64_t j = 0; j < columns; j += block) {
    const int64_t n = std::min(block, columns - j);
    for (int64_t t = 0; t < terms; ++t) round_columns(count, factors[t].left + j, factors[t].left_stride, left.data[t]);
    for (int64_t at = 0; at < depth; at += block) {
      zero_sums();
      for (int64_t t = 0; t < terms; ++t) {
        const float* right = factors[t].right + at / block * factors[t].right_stride;
        add_products(n > half, left.data[t][0], blocks_of(count), right, step_in_slices);
      }
      give_sums(n, std::min(block, depth - at), alpha, accumulate, keys + j * key_stride + at, key_stride);
    }
  }
}

const Products<float> table{block, block, pack, slice, outer, to_rows, to_keys};

}  // namespace

const Products<float>* tile_products() { return cpu_capability() == Capability::amx ? &table : nullptr; }

}  // namespace metafast

#pragma GCC pop_options

#else

namespace metafast {

const Products<float>* tile_products() { return nullptr; }

}  // namespace metafast

#endif
