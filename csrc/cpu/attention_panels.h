// Row panels: some rows of queries against all keys that they may attend to, the unit in which attention works on the CPU.
// A panel's scores stay in cache, so the softmax and its row statistics are exact at once, without an online softmax. Here is
// which panels there are and who works on which.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/aligned_memory.h"
#include "cpu/attention_problem.h"
#include "cpu/products.h"

namespace metafast {

constexpr int64_t most_rows = 132;

// A number of columns in whole blocks of the products.
template <typename T>
int64_t padded_columns(int64_t columns) {
  const int64_t block = products<T>().block;
  return (columns + block - 1) / block * block;
}

// What has a row a key and is laid out for products with panels' rows; a pass leaves out what it does not multiply so.
enum { of_key, of_value, of_tangent_key, of_tangent_value };

template <typename T>
struct Packed {
  const Matrices<const T>* matrices = nullptr;
  int64_t depth = 0;
};

// How many rows a panel has. Taller panels read the keys less often; shorter ones keep the buffers nearer to the core.
template <typename T>
int64_t panel_rows(const Problem<T>& problem, int64_t buffers) {
  constexpr int64_t cache = 1024 * 1024;
  const int64_t columns = std::max<int64_t>(problem.widest(most_rows), 1);
  const int64_t fitting = cache / (buffers * columns * int64_t(sizeof(T)));
  const int64_t most = std::clamp<int64_t>((fitting + 3) / 6 * 6, 18, most_rows);
  const int64_t rows = std::max<int64_t>(problem.rows, 1), panels = (rows + most - 1) / most;
  return (rows + panels - 1) / panels;
}

// One operand of a product: a panel's rows, or the keys that the panel reads, of a tensor's matrix; or scores in a buffer.
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

// Scratch of one thread: buffers for the scores of a panel, and what is laid out once for all panels of a key head, the
// matrices that the pass multiplies panels' rows with. Buffers are uninitialised: every pass writes before it reads.
template <typename T>
class Scratch {
 public:
  Scratch(const Problem<T>& problem, int64_t buffers, int64_t panel, const std::vector<Packed<T>>& keys)
      : stride(stride_of(padded_columns<T>(problem.widest(panel)))), problem_(problem), keys_(keys), size_(panel * stride) {
    int64_t total = buffers * size_;
    for (const Packed<T>& one : keys_) {
      offsets_.push_back(total);
      total += padded_columns<T>(problem.columns) * one.depth;
    }
    memory_ = aligned_memory<T>(total);
  }

  // A buffer of the panel's scores.
  T* operator[](int64_t i) const { return memory_.get() + i * size_; }

  // The same as an operand of a product.
  Operand<const T> scores(int64_t i) const { return {(*this)[i], stride}; }

  // The keys that a panel reads, of_key and so on, as outer takes them.
  Operand<const T> keys(int64_t i, const Panel& panel) const {
    const int64_t depth = keys_[size_t(i)].depth;
    return {memory_.get() + offsets_[size_t(i)] + panel.begin * depth, depth};
  }

  void move_to(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch;
    key_head_ = key_head;
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (!keys_[i].matrices) continue;
      const Matrices<const T>& matrices = *keys_[i].matrices;
      products<T>().pack(problem_.columns, keys_[i].depth, matrices.at(batch, key_head), matrices.row_stride, memory_.get() + offsets_[i]);
    }
  }

  const int64_t stride;

 private:
  // Rows a large power of two apart would compete for the same lines of the cache.
  static int64_t stride_of(int64_t columns) { return columns % 256 == 0 ? columns + products<T>().block : columns; }

  const Problem<T>& problem_;
  const std::vector<Packed<T>>& keys_;
  const int64_t size_;
  std::vector<int64_t> offsets_;
  Memory<T> memory_;
  int64_t batch_ = -1, key_head_ = -1;
};

template <typename T>
void zero_rows(Operand<T> rows, int64_t count, int64_t depth) {
  for (int64_t i = 0; i < count; ++i) std::fill(rows.data + i * rows.stride, rows.data + i * rows.stride + depth, T(0));
}

// Below about this many multiply-adds a second thread costs more than it brings.
constexpr int64_t worth_a_thread = 1 << 17;

// Calls work(next) on each of the threads that `pieces` are worth, at least `fewest` of them each; next() is the next piece that
// none has taken, or past the last. Not an equal share for each: a core that others use too would keep its share waiting.
template <typename Work>
void share_out(int64_t pieces, int64_t fewest, Work work) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (pieces + fewest - 1) / fewest);
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work([&] { return taken.fetch_add(1, std::memory_order_relaxed); }); });
}

// Calls body(panel, scratch) for every panel; for passes that write nothing but their own rows.
template <typename T, typename Body>
void for_each_panel(const Problem<T>& problem, int64_t buffers, const std::vector<Packed<T>>& keys, Body body) {
  const int64_t height = panel_rows(problem, buffers), panels = (problem.rows + height - 1) / height;
  const int64_t work = std::max<int64_t>(height * problem.widest(height) * (problem.depth + problem.value_depth), 1);
  const int64_t total = problem.batches * problem.heads * panels;
  // The panels of a head together where there are enough heads: a thread lays its keys out once.
  const int64_t together = std::clamp<int64_t>(total / (8 * torch::stable::get_num_threads()), 1, std::max<int64_t>(panels, 1));
  const int64_t pieces = (total + together - 1) / together;
  share_out(pieces, worth_a_thread / (work * together) + 1, [&](auto next) {
    Scratch<T> scratch(problem, buffers, height, keys);
    for (int64_t piece; (piece = next()) < pieces;) {
      for (int64_t i = piece * together; i < std::min(total, (piece + 1) * together); ++i) {
        const int64_t matrix = i / panels, first = i % panels * height;
        Panel panel{matrix / problem.heads, matrix % problem.heads, first, std::min(height, problem.rows - first), 0, 0};
        trim(problem, panel);
        scratch.move_to(panel.batch, panel.head / problem.group());
        body(panel, scratch);
      }
    }
  });
}

// Sums over rows: what for a key head and its group of query heads is added up in key-shaped outputs.
template <typename T>
struct KeySums {
  Matrices<T> key, value;
};

// Calls body(panel, scratch, key_sum, value_sum) for every panel, where the sums are the blocks that the panel adds to. Key heads
// are spread over threads; where there are too few of them, so are the panels of one, each share with sums of its own, which are
// then added in a fixed order.
template <typename T, typename Body>
void for_each_panel_summing(const Problem<T>& problem, const KeySums<T>& sums, int64_t buffers, const std::vector<Packed<T>>& keys, Body body) {
  const int64_t height = panel_rows(problem, buffers), panels = (problem.rows + height - 1) / height * problem.group();
  const int64_t units = problem.batches * problem.key_heads, threads = torch::stable::get_num_threads();
  if (units == 0) return;
  const int64_t work = std::max<int64_t>(panels * height * problem.widest(height) * (problem.depth + problem.value_depth), 1);
  const int64_t shares = units >= threads ? 1 : std::clamp<int64_t>(std::min(panels, work / worth_a_thread), 1, (threads + units - 1) / units);
  const int64_t per_share = (panels + shares - 1) / shares;
  const int64_t key_size = padded_columns<T>(problem.columns) * problem.depth;
  const int64_t size = key_size + padded_columns<T>(problem.columns) * problem.value_depth;
  const auto write = [&](int64_t unit, const T* sum) {
    const int64_t batch = unit / problem.key_heads, key_head = unit % problem.key_heads;
    products<T>().unpack(problem.columns, problem.depth, sum, sums.key.at(batch, key_head), sums.key.row_stride);
    products<T>().unpack(problem.columns, problem.value_depth, sum + key_size, sums.value.at(batch, key_head), sums.value.row_stride);
  };
  const Memory<T> of_shares = shares > 1 ? aligned_memory<T>(units * shares * size) : nullptr;

  share_out(units * shares, shares > 1 ? 1 : worth_a_thread / work + 1, [&](auto next) {
    Scratch<T> scratch(problem, buffers, height, keys);
    const Memory<T> own = shares > 1 ? nullptr : aligned_memory<T>(size);
    for (int64_t i; (i = next()) < units * shares;) {
      const int64_t unit = i / shares, share = i % shares;
      const int64_t batch = unit / problem.key_heads, key_head = unit % problem.key_heads;
      T* sum = shares > 1 ? of_shares.get() + i * size : own.get();
      std::fill(sum, sum + size, T(0));
      scratch.move_to(batch, key_head);
      for (int64_t j = share * per_share; j < std::min(panels, (share + 1) * per_share); ++j) {
        const int64_t per_head = panels / problem.group(), first = j % per_head * height;
        Panel panel{batch, key_head * problem.group() + j / per_head, first, std::min(height, problem.rows - first), 0, 0};
        trim(problem, panel);
        body(panel, scratch, sum + panel.begin * problem.depth, sum + key_size + panel.begin * problem.value_depth);
      }
      if (shares == 1) write(unit, sum);
    }
  });

  if (shares == 1) return;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      T* sum = of_shares.get() + unit * shares * size;
      for (int64_t share = 1; share < shares; ++share) {
        for (int64_t c = 0; c < size; ++c) sum[c] += sum[share * size + c];
      }
      write(unit, sum);
    }
  });
}

}  // namespace metafast
