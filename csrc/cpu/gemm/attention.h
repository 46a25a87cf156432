// The matrix products of attention on one thread. A BLAS packs both operands anew in every call, for each panel of rows and for
// the smallest of heads; here what belongs to the keys of a head is laid out once and read by all of its panels, and of what has
// a row a query, only what is multiplied with a panel's columns is copied. Those of bfloat16 are in gemm/amx_tiles.h.
//
// Right factors are laid out so that a tile reads them from consecutive vectors, whatever the strides of the tensor, whose rows may
// lie so far apart that only a few of them fit into the first cache. There are two layouts of [rows, depth]. "Blocked" is the
// transpose in pieces: [rows / block][depth][block], with zeros after the last row. "Slices" are vertical: [depth / block][rows][block],
// with zeros after the last column. A panel x is [count, columns] with rows that are padded to a multiple of the block.
#pragma once

#include <cstdint>

namespace metafast {

// Two matrices to be multiplied, and how far apart their rows are. A product is a sum over such pairs, because derivatives come as
// sums of products: one pass reads and writes what is summed into once.
template <typename T>
struct Factors {
  const T* left;
  int64_t left_stride;
  const T* right;
  int64_t right_stride;
};

template <typename T>
struct Products {
  int64_t block;
  // Rows that are multiplied at a time, of which panels should have whole ones.
  int64_t rows;

  // blocked = keys, and slices = rows, both [rows, depth]; from one slice to the next it is slice_size.
  void (*pack)(int64_t columns, int64_t depth, const T* keys, int64_t stride, T* blocked);
  void (*slice)(int64_t rows, int64_t depth, const T* from, int64_t stride, T* slices, int64_t slice_size);

  // x = alpha sum rows keys^T: left is rows [count, depth], right blocked keys, whose stride is not read. Writes whole blocks.
  void (*outer)(int64_t count, int64_t columns, int64_t depth, T alpha, int64_t terms, const Factors<T>* factors, T* x, int64_t stride);
  // rows = alpha sum x keys: left is a panel, right slices of keys [columns, depth], the stride of which is their size.
  void (*to_rows)(int64_t count, int64_t columns, int64_t depth, T alpha, int64_t terms, const Factors<T>* factors, T* rows, int64_t row_stride);
  // keys = alpha sum x^T rows, or keys + that: left is a panel, right slices of rows [count, depth].
  void (*to_keys)(int64_t count, int64_t columns, int64_t depth, T alpha, int64_t terms, const Factors<T>* factors, bool accumulate, T* keys,
                  int64_t key_stride);
};

// The widest variant that this machine runs.
template <typename T>
const Products<T>& products();

}  // namespace metafast
