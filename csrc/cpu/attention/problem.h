// One call of attention as the kernels on the CPU read it: tensors as matrices, sizes, and which keys a row may attend to.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "cpu/gemm/attention.h"
#include "cpu/gemm/amx_tiles.h"

namespace metafast {

// A tensor [*lead, heads, rows, columns] as pointers to matrices whose rows are contiguous; the leading dimensions are
// one index, the batch, in the order of the problem's. A mask's dimensions of size 1 are read again and again.
template <typename T>
class Matrices {
 public:
  Matrices(const Tensor& tensor, const std::vector<int64_t>& lead)
      : data_(static_cast<T*>(tensor.data_ptr())), lead_sizes_(lead) {
    const auto stride_of = [&](int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
    const int64_t rank = tensor.dim();
    for (int64_t i = 0; i < rank - 3; ++i) lead_strides_.push_back(stride_of(i));
    head_stride_ = stride_of(rank - 3);
    row_stride = stride_of(rank - 2);
    column_stride = stride_of(rank - 1);
  }

  T* at(int64_t batch, int64_t head) const {
    int64_t offset = head * head_stride_;
    for (size_t i = lead_sizes_.size(); i-- > 0;) {
      offset += batch % lead_sizes_[i] * lead_strides_[i];
      batch /= lead_sizes_[i];
    }
    return data_ + offset;
  }

  int64_t row_stride, column_stride;

 private:
  T* data_;
  int64_t head_stride_;
  std::vector<int64_t> lead_sizes_, lead_strides_;
};

// Dropout of a call; see reference.py for which weights are kept.
struct Dropout {
  const int64_t* seeds;  // one a batch
  uint32_t threshold;
  double scale;
};

// What multiplies: for bfloat16, tiles where the machine has them and heads are wide enough.
template <typename T>
const Products<T>& products_for(bool bfloat16, int64_t depth, int64_t value_depth) {
  if constexpr (std::is_same_v<T, float>) {
    const bool fits = std::min(depth, value_depth) >= tile_products_least_depth && std::max(depth, value_depth) <= tile_products_most_depth;
    const Products<float>* tiles = bfloat16 && fits ? tile_products() : nullptr;
    if (tiles) return *tiles;
  }
  return products<T>();
}

// Keys, or columns of a panel: [first, last).
struct Range {
  int64_t first, last;
};

// What the passes have in common: sizes, what may be attended to, and the scale.
template <typename T>
struct Problem {
  using Element = T;

  // Where the inputs were bfloat16, products may round what they multiply to that type.
  Problem(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options, bool is_bfloat16)
      : lead(query.sizes().begin(), query.sizes().end() - 3), q(query, lead), k(key, lead), v(value, lead),
        products(products_for<T>(is_bfloat16, query.size(query.dim() - 1), value.size(value.dim() - 1))),
        left(options.left), right(options.right), scale(T(options.scale)) {
    const int64_t rank = query.dim();
    for (int64_t size : lead) batches *= size;
    heads = query.size(rank - 3);
    key_heads = key.size(rank - 3);
    rows = query.size(rank - 2);
    columns = key.size(rank - 2);
    depth = query.size(rank - 1);
    value_depth = value.size(rank - 1);
    if (options.seeds) {
      // The smallest 32-bit word that is kept.
      const double words = 4294967296.0, threshold = std::nearbyint(options.dropout_p * words);
      dropout = Dropout{static_cast<const int64_t*>(options.seeds->data_ptr()), uint32_t(std::min(threshold, words - 1)),
                        1.0 / (1.0 - options.dropout_p)};
    }
    longest = columns;
    if (options.key_ranges) {
      key_ranges = static_cast<const int64_t*>(options.key_ranges->data_ptr());
      longest = 0;
      for (int64_t batch = 0; batch < batches; ++batch) longest = std::max(longest, existing(batch).last - existing(batch).first);
    }
    if (!options.attn_mask) return;
    if (options.attn_mask->scalar_type() == torch::headeronly::ScalarType::Bool) keep.emplace(*options.attn_mask, lead);
    else bias.emplace(*options.attn_mask, lead);
  }

  std::vector<int64_t> lead;
  Matrices<const T> q, k, v;
  std::optional<Matrices<const bool>> keep;
  std::optional<Matrices<const T>> bias;
  std::optional<Dropout> dropout;
  const Products<T>& products;
  int64_t batches = 1, heads, key_heads, rows, columns, depth, value_depth;
  int64_t left, right;
  const int64_t* key_ranges = nullptr;  // two numbers a batch
  int64_t longest;                      // the most keys that exist in a batch
  T scale;

  int64_t group() const { return key_heads > 0 ? heads / key_heads : 1; }

  // The keys of a batch that exist.
  Range existing(int64_t batch) const {
    return key_ranges ? Range{key_ranges[2 * batch], key_ranges[2 * batch + 1]} : Range{0, columns};
  }

  // The keys of a batch that some of the rows [first, first + count) may attend to, masks aside.
  Range reached(int64_t batch, int64_t first, int64_t count) const {
    const auto [begin, end] = existing(batch);
    const int64_t last = std::clamp(first + count + right, begin, end);
    return {std::clamp(first - left, begin, last), last};
  }

  // The most keys that a panel of so many rows reads, masks aside.
  int64_t widest(int64_t panel_rows) const {
    const int64_t aligning = 2 * products.block;
    return std::clamp<int64_t>(std::min(left + right + panel_rows, longest) + aligning, 0, columns);
  }
};

// The directions of a derivative, shaped like query, key, value and an additive mask.
template <typename T>
struct Tangents {
  Matrices<const T> q, k, v;
  std::optional<Matrices<const T>> mask;
};

// Rows [first, first + count) of one head, against the keys [begin, end): those that some of its rows may attend to.
struct Panel {
  int64_t batch, head, first, count, begin, end;
  int64_t columns() const { return end - begin; }
};

// Keys in whole blocks of the products; none where there are none.
template <typename T>
Range aligned(const Problem<T>& problem, Range keys) {
  if (keys.first == keys.last) return keys;
  const int64_t block = problem.products.block;
  return {keys.first / block * block, std::min(problem.columns, (keys.last + block - 1) / block * block)};
}

// Narrows a panel to the keys between the first and the last that a mask allows any of its rows.
template <typename Entry, typename Allows>
void narrow(const Matrices<const Entry>& mask, Panel& panel, Allows allows) {
  const Entry* data = mask.at(panel.batch, panel.head) + panel.first * mask.row_stride;
  const int64_t distinct = mask.row_stride == 0 ? 1 : panel.count;
  int64_t begin = panel.end, end = panel.begin;
  for (int64_t i = 0; i < distinct; ++i, data += mask.row_stride) {
    int64_t first = panel.begin;
    while (first < begin && !allows(data[first * mask.column_stride])) ++first;
    begin = std::min(begin, first);
    int64_t last = panel.end;
    while (last > end && !allows(data[(last - 1) * mask.column_stride])) --last;
    end = std::max(end, last);
  }
  panel.begin = std::min(begin, end);
  panel.end = end;
}

// Narrows a panel to the keys between the first and the last that any of its rows may attend to, in whole blocks. The keys that
// these add are forbidden like others inside the panel.
template <typename T>
void trim(const Problem<T>& problem, Panel& panel) {
  const Range reached = problem.reached(panel.batch, panel.first, panel.count);
  panel.begin = reached.first;
  panel.end = reached.last;
  if (problem.keep) narrow(*problem.keep, panel, [](bool keep) { return keep; });
  if (problem.bias) narrow(*problem.bias, panel, [](T bias) { return !(bias == -std::numeric_limits<T>::infinity()); });
  const Range whole = aligned(problem, {panel.begin, panel.end});
  panel.begin = whole.first;
  panel.end = whole.last;
}

// The part of a panel's columns that its row i may attend to, masks aside.
template <typename T>
Range row_range(const Problem<T>& problem, const Panel& panel, int64_t i) {
  const Range reached = problem.reached(panel.batch, panel.first + i, 1);
  // Where masks have narrowed the panel, some of that is outside.
  const int64_t n = panel.columns(), first = std::clamp<int64_t>(reached.first - panel.begin, 0, n);
  return {first, std::clamp<int64_t>(reached.last - panel.begin, first, n)};
}

}  // namespace metafast
