// Row panels: some rows of queries against all keys that they may attend to, the unit in which attention works on the CPU.
// A panel's scores stay in cache, so the softmax and its row statistics are exact at once, without an online softmax. Here is
// which panels there are and who works on which.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/attention_problem.h"

namespace metafast {

constexpr int64_t most_rows = 128;

// How many rows a panel has. Taller panels make better matrix products, which pack the keys anew for every panel; shorter ones
// keep the buffers nearer to the core. Between 1 and 4 MiB a thread there is little to choose (measured at N = 128 to 2048).
template <typename T>
int64_t panel_rows(const Problem<T>& problem, int64_t buffers) {
  constexpr int64_t cache = 2 * 1024 * 1024;
  const int64_t columns = std::max<int64_t>(problem.widest(most_rows), 1);
  const int64_t fitting = cache / (buffers * columns * int64_t(sizeof(T)));
  const int64_t most = std::clamp<int64_t>(fitting / 8 * 8, 16, most_rows);
  const int64_t rows = std::max<int64_t>(problem.rows, 1), panels = (rows + most - 1) / most;
  return (rows + panels - 1) / panels;
}

// Scratch of one thread. Uninitialised: every pass writes before it reads.
template <typename T>
struct Buffers {
  Buffers(const Problem<T>& problem, int64_t count, int64_t panel)
      : stride(stride_of(problem.widest(panel))), size(panel * stride), memory(new T[size_t(count * size)]) {}
  T* operator[](int64_t i) const { return memory.get() + i * size; }

  // Rows a large power of two apart would compete for the same lines of the cache.
  static int64_t stride_of(int64_t columns) {
    const int64_t padded = (columns + 15) / 16 * 16;
    return padded % 256 == 0 ? padded + 16 : padded;
  }

  int64_t stride, size;
  std::unique_ptr<T[]> memory;
};

// One operand of a product: a panel's rows, or the keys that the panel reads, of a tensor's matrix.
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
  const int64_t work = std::max<int64_t>(height * problem.widest(height) * (problem.depth + problem.value_depth), 1);
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
  const int64_t work = std::max<int64_t>(panels * height * problem.widest(height) * (problem.depth + problem.value_depth), 1);
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

}  // namespace metafast
