// Row panels: some rows of queries against all keys that they may attend to, the unit in which attention works on the CPU.
// A panel's scores stay in cache, so the softmax and its row statistics are exact at once, without an online softmax. Here is
// what the passes of attention.cpp share: how tensors are read, which panels there are and who works on which, the softmax of
// a panel, and the three products between what has a row a query, what has a row a key, and a panel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/attention_rows.h"
#include "cpu/gemm.h"

namespace metafast {

using torch::stable::Tensor;

// A tensor [*lead, heads, rows, columns] as pointers to matrices whose rows are contiguous.
template <typename T>
class Matrices {
 public:
  explicit Matrices(const Tensor& tensor) : data_(static_cast<T*>(tensor.data_ptr())) {
    const int64_t rank = tensor.dim();
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    lead_sizes_.assign(sizes.begin(), sizes.begin() + (rank - 3));
    lead_strides_.assign(strides.begin(), strides.begin() + (rank - 3));
    head_stride_ = strides[rank - 3];
    row_stride = strides[rank - 2];
    column_stride = strides[rank - 1];
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

// What the four passes have in common: sizes, the mask and the scale.
template <typename T>
struct Problem {
  Problem(const Tensor& query, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& attn_mask,
          bool is_causal, double scale_)
      : q(query), k(key_), v(value_), causal(is_causal), scale(T(scale_)) {
    const int64_t rank = query.dim();
    for (int64_t i = 0; i < rank - 3; ++i) batches *= query.size(i);
    heads = query.size(rank - 3);
    key_heads = key_.size(rank - 3);
    rows = query.size(rank - 2);
    columns = key_.size(rank - 2);
    depth = query.size(rank - 1);
    value_depth = value_.size(rank - 1);
    if (!attn_mask) return;
    if (attn_mask->scalar_type() == torch::headeronly::ScalarType::Bool) keep.emplace(*attn_mask);
    else bias.emplace(*attn_mask);
  }

  Matrices<const T> q, k, v;
  std::optional<Matrices<const bool>> keep;
  std::optional<Matrices<const T>> bias;
  int64_t batches = 1, heads, key_heads, rows, columns, depth, value_depth;
  bool causal;
  T scale;

  int64_t group() const { return heads / key_heads; }
};

// Rows [first, first + count) of one head, against the keys [begin, end): those that some of its rows may attend to.
struct Panel {
  int64_t batch, head, first, count, begin, end;
  int64_t columns() const { return end - begin; }
};

// How many rows a panel has. Taller panels make better matrix products, which pack the keys anew for every panel; shorter ones
// keep the buffers nearer to the core. Between 1 and 4 MiB a thread there is little to choose (measured at N = 128 to 2048).
template <typename T>
int64_t panel_rows(const Problem<T>& problem, int64_t buffers) {
  constexpr int64_t cache = 2 * 1024 * 1024;
  const int64_t fitting = cache / (buffers * std::max<int64_t>(problem.columns, 1) * int64_t(sizeof(T)));
  const int64_t most = std::clamp<int64_t>(fitting / 8 * 8, 16, 128);
  const int64_t rows = std::max<int64_t>(problem.rows, 1), panels = (rows + most - 1) / most;
  return (rows + panels - 1) / panels;
}

// A row's score buffer; rows a large power of two apart would compete for the same lines of the cache.
template <typename T>
int64_t buffer_stride(const Problem<T>& problem) {
  const int64_t padded = (problem.columns + 15) / 16 * 16;
  return padded % 256 == 0 ? padded + 16 : padded;
}

// Scratch of one thread. Uninitialised: every pass writes before it reads.
template <typename T>
struct Buffers {
  Buffers(const Problem<T>& problem, int64_t count, int64_t panel)
      : stride(buffer_stride(problem)), size(panel * stride), memory(new T[size_t(count * size)]) {}
  T* operator[](int64_t i) const { return memory.get() + i * size; }

  int64_t stride, size;
  std::unique_ptr<T[]> memory;
};

template <typename T>
bool may_attend(const Problem<T>& problem, const Panel& panel, int64_t row, int64_t column) {
  if (problem.keep) {
    const auto& keep = *problem.keep;
    return keep.at(panel.batch, panel.head)[row * keep.row_stride + column * keep.column_stride];
  }
  const auto& bias = *problem.bias;
  const T added = bias.at(panel.batch, panel.head)[row * bias.row_stride + column * bias.column_stride];
  return !(added == -std::numeric_limits<T>::infinity());
}

// Narrows a panel to the keys between the first and the last that any of its rows may attend to.
template <typename T>
void trim(const Problem<T>& problem, Panel& panel) {
  panel.begin = 0;
  panel.end = problem.causal ? std::min(problem.columns, panel.first + panel.count) : problem.columns;
  if (!problem.keep && !problem.bias) return;
  const int64_t row_stride = problem.keep ? problem.keep->row_stride : problem.bias->row_stride;
  const int64_t distinct = row_stride == 0 ? 1 : panel.count;
  int64_t begin = panel.end, end = 0;
  for (int64_t i = panel.first; i < panel.first + distinct; ++i) {
    int64_t first = 0;
    while (first < begin && !may_attend(problem, panel, i, first)) ++first;
    begin = std::min(begin, first);
    int64_t last = panel.end;
    while (last > end && !may_attend(problem, panel, i, last - 1)) --last;
    end = std::max(end, last);
  }
  panel.begin = std::min(begin, end);
  panel.end = end;
}

// Rows of a panel that end before it does, the causal ones: the number of its columns that row i may attend to at all.
template <typename T>
int64_t row_columns(const Problem<T>& problem, const Panel& panel, int64_t i) {
  if (!problem.causal) return panel.columns();
  return std::clamp<int64_t>(panel.first + i + 1 - panel.begin, 0, panel.columns());
}

// scale q k^T under the mask, the causal part excepted.
template <typename T>
void scores(const Problem<T>& problem, const Panel& panel, T* s, int64_t stride) {
  const int64_t key_head = panel.head / problem.group(), n = panel.columns();
  gemm(false, true, panel.count, n, problem.depth, problem.scale,
       problem.q.at(panel.batch, panel.head) + panel.first * problem.q.row_stride, problem.q.row_stride,
       problem.k.at(panel.batch, key_head) + panel.begin * problem.k.row_stride, problem.k.row_stride, T(0), s, stride);
  const AttentionRows<T>& row = attention_rows<T>();
  if (problem.keep) {
    const auto& keep = *problem.keep;
    const bool* data = keep.at(panel.batch, panel.head) + panel.first * keep.row_stride + panel.begin * keep.column_stride;
    for (int64_t i = 0; i < panel.count; ++i) row.keep_only(n, data + i * keep.row_stride, keep.column_stride, s + i * stride);
  } else if (problem.bias) {
    const auto& bias = *problem.bias;
    const T* data = bias.at(panel.batch, panel.head) + panel.first * bias.row_stride + panel.begin * bias.column_stride;
    for (int64_t i = 0; i < panel.count; ++i) row.add_bias(n, data + i * bias.row_stride, bias.column_stride, s + i * stride);
  }
}

// The softmax again, from the saved statistic; zero past a causal row's end.
template <typename T>
void probabilities(const Problem<T>& problem, const Panel& panel, const T* lse, T* p, int64_t stride) {
  scores(problem, panel, p, stride);
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t n = row_columns(problem, panel, i);
    attention_rows<T>().probabilities(n, lse[panel.first + i], p + i * stride);
    std::fill(p + i * stride + n, p + i * stride + panel.columns(), T(0));
  }
}

// One operand of the products below: a panel's rows, or the keys that the panel reads, of a tensor's matrix.
template <typename T>
struct Operand {
  T* data;
  int64_t stride;
};

template <typename T>
Operand<T> rows_of(const Matrices<T>& tensor, const Panel& panel) {
  return {tensor.at(panel.batch, panel.head) + panel.first * tensor.row_stride, tensor.row_stride};
}

template <typename T>
Operand<T> keys_of(const Matrices<T>& tensor, const Panel& panel, int64_t group) {
  return {tensor.at(panel.batch, panel.head / group) + panel.begin * tensor.row_stride, tensor.row_stride};
}

// The three products of a pass. x is [count, columns] in a panel's buffer, rows is [count, depth], keys [columns, depth].
// x = alpha rows keys^T + beta x
template <typename T>
void outer(const Panel& panel, int64_t depth, T alpha, Operand<const T> rows, Operand<const T> keys, T beta, T* x, int64_t stride) {
  gemm(false, true, panel.count, panel.columns(), depth, alpha, rows.data, rows.stride, keys.data, keys.stride, beta, x, stride);
}

// rows = alpha x keys + beta rows
template <typename T>
void to_rows(const Panel& panel, int64_t depth, T alpha, const T* x, int64_t stride, Operand<const T> keys, T beta, Operand<T> rows) {
  gemm(false, false, panel.count, depth, panel.columns(), alpha, x, stride, keys.data, keys.stride, beta, rows.data, rows.stride);
}

// keys += alpha x^T rows
template <typename T>
void to_keys(const Panel& panel, int64_t depth, T alpha, const T* x, int64_t stride, Operand<const T> rows, Operand<T> keys) {
  gemm(true, false, panel.columns(), depth, panel.count, alpha, x, stride, rows.data, rows.stride, T(1), keys.data, keys.stride);
}

template <typename T>
void zero_rows(Operand<T> rows, int64_t count, int64_t depth) {
  for (int64_t i = 0; i < count; ++i) std::fill(rows.data + i * rows.stride, rows.data + i * rows.stride + depth, T(0));
}

// Below about this many multiply-adds a second thread costs more than it brings.
constexpr int64_t worth_a_thread = 1 << 17;

// Calls body(panel, buffers) for every panel; for passes that write nothing but their own rows.
template <typename T, typename Body>
void for_each_panel(const Problem<T>& problem, int64_t buffers, Body body) {
  const int64_t height = panel_rows(problem, buffers), panels = (problem.rows + height - 1) / height;
  const int64_t work = std::max<int64_t>(height * problem.columns * (problem.depth + problem.value_depth), 1);
  torch::stable::parallel_for(0, problem.batches * problem.heads * panels, worth_a_thread / work + 1, [&](int64_t begin, int64_t end) {
    const Buffers<T> scratch(problem, buffers, height);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t matrix = i / panels, first = i % panels * height;
      Panel panel{matrix / problem.heads, matrix % problem.heads, first, std::min(height, problem.rows - first), 0, 0};
      trim(problem, panel);
      body(panel, scratch);
    }
  });
}

// Sums over rows: what for a key head and its group of query heads is added up in key-shaped outputs.
template <typename T>
struct KeySums {
  Matrices<T> key, value;
};

// Calls body(panel, buffers, key_sum, value_sum) for every panel, where key_sum(panel) and value_sum(panel) are the rows
// that the panel adds to. Key heads are spread over threads; where there are too few of them, so are the panels of one, each
// share with sums of its own, which are then added in a fixed order.
template <typename T, typename Body>
void for_each_panel_summing(const Problem<T>& problem, const KeySums<T>& sums, int64_t buffers, Body body) {
  const int64_t height = panel_rows(problem, buffers), panels = (problem.rows + height - 1) / height * problem.group();
  const int64_t units = problem.batches * problem.key_heads, threads = torch::stable::get_num_threads();
  if (units == 0) return;
  const int64_t work = std::max<int64_t>(panels * height * problem.columns * (problem.depth + problem.value_depth), 1);
  const int64_t shares = units >= threads ? 1 : std::clamp<int64_t>(std::min(panels, work / worth_a_thread), 1, (threads + units - 1) / units);
  const int64_t per_share = (panels + shares - 1) / shares;
  const int64_t key_size = problem.columns * problem.depth, value_size = problem.columns * problem.value_depth;
  std::vector<T> partial(size_t((shares - 1) * units * (key_size + value_size)));

  torch::stable::parallel_for(0, units * shares, shares > 1 ? 1 : worth_a_thread / work + 1, [&](int64_t begin, int64_t end) {
    const Buffers<T> scratch(problem, buffers, height);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / shares, share = i % shares;
      const int64_t batch = unit / problem.key_heads, key_head = unit % problem.key_heads;
      Operand<T> key_sum{sums.key.at(batch, key_head), sums.key.row_stride};
      Operand<T> value_sum{sums.value.at(batch, key_head), sums.value.row_stride};
      if (share > 0) {
        T* own = partial.data() + (unit * (shares - 1) + share - 1) * (key_size + value_size);
        key_sum = {own, problem.depth};
        value_sum = {own + key_size, problem.value_depth};
      } else {
        zero_rows(key_sum, problem.columns, problem.depth);
        zero_rows(value_sum, problem.columns, problem.value_depth);
      }
      for (int64_t j = share * per_share; j < std::min(panels, (share + 1) * per_share); ++j) {
        const int64_t per_head = panels / problem.group(), first = j % per_head * height;
        Panel panel{batch, key_head * problem.group() + j / per_head, first, std::min(height, problem.rows - first), 0, 0};
        trim(problem, panel);
        body(panel, scratch, Operand<T>{key_sum.data + panel.begin * key_sum.stride, key_sum.stride},
             Operand<T>{value_sum.data + panel.begin * value_sum.stride, value_sum.stride});
      }
    }
  });

  if (shares == 1) return;
  torch::stable::parallel_for(0, units * problem.columns, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / problem.columns, j = i % problem.columns;
      T* key = sums.key.at(unit / problem.key_heads, unit % problem.key_heads) + j * sums.key.row_stride;
      T* value = sums.value.at(unit / problem.key_heads, unit % problem.key_heads) + j * sums.value.row_stride;
      for (int64_t share = 0; share < shares - 1; ++share) {
        const T* own = partial.data() + (unit * (shares - 1) + share) * (key_size + value_size);
        for (int64_t c = 0; c < problem.depth; ++c) key[c] += own[j * problem.depth + c];
        for (int64_t c = 0; c < problem.value_depth; ++c) value[c] += own[key_size + j * problem.value_depth + c];
      }
    }
  });
}

// Statistics are [*lead, heads, rows], contiguous.
template <typename T, typename Scalar>
Scalar* statistic_at(const Problem<T>& problem, Scalar* data, const Panel& panel) {
  return data + (panel.batch * problem.heads + panel.head) * problem.rows;
}

}  // namespace metafast
