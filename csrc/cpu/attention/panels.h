// Row panels: some rows of queries against all keys that they may attend to, the unit in which attention works on the CPU.
// A panel's scores stay in cache, so the softmax and its row statistics are exact at once, without an online softmax. Here is
// which panels there are and who works on which.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "cpu/aligned_memory.h"
#include "cpu/attention/problem.h"
#include "cpu/gemm/attention.h"

namespace metafast {

constexpr int64_t most_rows = 132;
static_assert(most_rows <= tile_products_most_depth);

// A number of columns, or of rows, in whole blocks of the products.
template <typename T>
int64_t padded(const Problem<T>& problem, int64_t size) {
  const int64_t block = problem.products.block;
  return (size + block - 1) / block * block;
}

// What has a row a key and is laid out for products: in blocks for those with panels' rows, in slices for those with their scores.
// A pass leaves out what it does not multiply.
enum { of_key, of_value, of_tangent_key, of_tangent_value };
enum Layout { in_blocks = 1, in_slices = 2, in_both = 3 };

template <typename T>
struct Packed {
  const Matrices<const T>* matrices = nullptr;
  int64_t depth = 0;
  Layout layout = in_both;
};

// How many rows a panel has. Taller panels read the keys less often; shorter ones keep the buffers nearer to the core.
template <typename T>
int64_t panel_rows(const Problem<T>& problem, int64_t buffers) {
  constexpr int64_t cache = 1024 * 1024;
  const int64_t columns = std::max<int64_t>(problem.widest(most_rows), 1);
  const int64_t fitting = cache / (buffers * columns * int64_t(sizeof(T)));
  const int64_t together = problem.products.rows;
  const int64_t whole = (fitting + together / 2) / together * together;
  const int64_t most = std::clamp(whole, std::max<int64_t>(18, together), most_rows / together * together);
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
Operand<T> rows_from(Operand<T> rows, int64_t first) {
  return {rows.data + first * rows.stride, rows.stride};
}

template <typename T>
Operand<T> rows_of(const Matrices<T>& tensor, const Panel& panel) {
  return {tensor.at(panel.batch, panel.head) + panel.first * tensor.row_stride, tensor.row_stride};
}

// Scratch of one thread: buffers for the scores of a panel, and what is laid out once for all panels of a key head, the
// matrices that the pass multiplies panels' rows with. Buffers are uninitialised: every pass writes before it reads.
template <typename T>
class Scratch {
 public:
  Scratch(const Problem<T>& problem, int64_t buffers, int64_t panel, const std::vector<Packed<T>>& keys)
      : stride(stride_of(padded(problem, problem.widest(panel)), problem.products.block)), problem_(problem), keys_(keys),
        size_(panel * stride), slice_of_rows_(padded(problem, panel) * problem.products.block),
        slice_of_keys_(padded(problem, problem.columns) * problem.products.block) {
    int64_t total = buffers * size_;
    const auto take = [&](int64_t size) { return std::exchange(total, total + size); };
    for (const Packed<T>& one : keys_) {
      blocks_.push_back(take(one.layout & in_blocks ? padded(problem, problem.columns) * one.depth : 0));
      slices_.push_back(take(one.layout & in_slices ? padded(problem, problem.columns) * padded(problem, one.depth) : 0));
    }
    for (int64_t& offset : rows_) offset = take(padded(problem, panel) * padded(problem, std::max(problem.depth, problem.value_depth)));
    memory_ = aligned_memory<T>(total);
  }

  // A buffer of the panel's scores.
  T* operator[](int64_t i) const { return memory_.get() + i * size_; }

  // The same as an operand of a product.
  Operand<const T> scores(int64_t i) const { return {(*this)[i], stride}; }

  // The keys that a panel reads, of_key and so on, as outer takes them and as to_rows does.
  Operand<const T> blocks(int64_t i, const Panel& panel) const {
    const int64_t depth = keys_[size_t(i)].depth;
    return {memory_.get() + blocks_[size_t(i)] + panel.begin * depth, depth};
  }
  Operand<const T> slices(int64_t i, const Panel& panel) const {
    return {memory_.get() + slices_[size_t(i)] + panel.begin * problem_.products.block, slice_of_keys_};
  }

  // A panel's rows as to_keys takes them, in the i-th of two places for them.
  Operand<const T> slices_of_rows(int64_t i, int64_t count, int64_t depth, const T* rows, int64_t row_stride) const {
    T* slices = memory_.get() + rows_[i];
    problem_.products.slice(count, depth, rows, row_stride, slices, slice_of_rows_);
    return {slices, slice_of_rows_};
  }

  // Lays out the keys of a head that its rows reach.
  void move_to(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch;
    key_head_ = key_head;
    const auto [begin, end] = aligned(problem_, problem_.reached(batch, 0, problem_.rows));
    for (size_t i = 0; i < keys_.size(); ++i) {
      const auto& [matrices, depth, layout] = keys_[i];
      if (!matrices) continue;
      const int64_t key_stride = matrices->row_stride;
      const T* keys = matrices->at(batch, key_head) + begin * key_stride;
      T *blocked = memory_.get() + blocks_[i] + begin * depth, *sliced = memory_.get() + slices_[i] + begin * problem_.products.block;
      if (layout & in_blocks) problem_.products.pack(end - begin, depth, keys, key_stride, blocked);
      if (layout & in_slices) problem_.products.slice(end - begin, depth, keys, key_stride, sliced, slice_of_keys_);
    }
  }

  const int64_t stride;

 private:
  // Rows a large power of two apart would compete for the same lines of the cache.
  static int64_t stride_of(int64_t columns, int64_t block) { return columns % 256 == 0 ? columns + block : columns; }

  const Problem<T>& problem_;
  const std::vector<Packed<T>>& keys_;
  const int64_t size_;
  // From one slice to the next, of a panel's rows and of keys.
  const int64_t slice_of_rows_, slice_of_keys_;
  std::vector<int64_t> blocks_, slices_;
  int64_t rows_[2];
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

// The rows of such a sum that belong to a panel's keys: those of the first panel are written, the others' added.
template <typename T>
struct KeySum {
  Operand<T> rows;
  bool begun;
};

// Calls body(panel, scratch, key_sum, value_sum) for every panel. Key heads are spread over threads; where there are too few of
// them, so are the panels of one, each share with sums of its own, which are then added in a fixed order.
template <typename T, typename Body>
void for_each_panel_summing(const Problem<T>& problem, const KeySums<T>& sums, int64_t buffers, const std::vector<Packed<T>>& keys, Body body) {
  const int64_t height = panel_rows(problem, buffers), panels = (problem.rows + height - 1) / height * problem.group();
  const int64_t units = problem.batches * problem.key_heads, threads = torch::stable::get_num_threads();
  if (units == 0) return;
  const int64_t d = problem.depth, dv = problem.value_depth;
  const int64_t work = std::max<int64_t>(panels * height * problem.widest(height) * (d + dv), 1);
  const int64_t shares = units >= threads ? 1 : std::clamp<int64_t>(std::min(panels, work / worth_a_thread), 1, (threads + units - 1) / units);
  const int64_t per_share = (panels + shares - 1) / shares, size = problem.columns * (d + dv);
  const Memory<T> of_shares = shares > 1 ? aligned_memory<T>(units * shares * size) : nullptr;

  share_out(units * shares, shares > 1 ? 1 : worth_a_thread / work + 1, [&](auto next) {
    Scratch<T> scratch(problem, buffers, height, keys);
    for (int64_t i; (i = next()) < units * shares;) {
      const int64_t unit = i / shares, share = i % shares;
      const int64_t batch = unit / problem.key_heads, key_head = unit % problem.key_heads;
      Operand<T> key{sums.key.at(batch, key_head), sums.key.row_stride}, value{sums.value.at(batch, key_head), sums.value.row_stride};
      if (shares > 1) {
        key = {of_shares.get() + i * size, d};
        value = {key.data + problem.columns * d, dv};
      }
      const auto zero_keys = [&](int64_t begin, int64_t end) {
        zero_rows(rows_from(key, begin), end - begin, d);
        zero_rows(rows_from(value, begin), end - begin, dv);
      };
      bool begun = false;
      scratch.move_to(batch, key_head);
      for (int64_t j = share * per_share; j < std::min(panels, (share + 1) * per_share); ++j) {
        const int64_t per_head = panels / problem.group(), first = j % per_head * height;
        Panel panel{batch, key_head * problem.group() + j / per_head, first, std::min(height, problem.rows - first), 0, 0};
        trim(problem, panel);
        if (!begun) {
          zero_keys(0, panel.begin);
          zero_keys(panel.end, problem.columns);
        }
        body(panel, scratch, KeySum<T>{rows_from(key, panel.begin), begun}, KeySum<T>{rows_from(value, panel.begin), begun});
        begun = true;
      }
      if (!begun) zero_keys(0, problem.columns);
    }
  });

  if (shares == 1) return;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      T* sum = of_shares.get() + unit * shares * size;
      for (int64_t share = 1; share < shares; ++share) {
        for (int64_t c = 0; c < size; ++c) sum[c] += sum[share * size + c];
      }
      const int64_t batch = unit / problem.key_heads, key_head = unit % problem.key_heads;
      T *key = sums.key.at(batch, key_head), *value = sums.value.at(batch, key_head);
      for (int64_t j = 0; j < problem.columns; ++j, sum += d) std::copy(sum, sum + d, key + j * sums.key.row_stride);
      for (int64_t j = 0; j < problem.columns; ++j, sum += dv) std::copy(sum, sum + dv, value + j * sums.value.row_stride);
    }
  });
}

}  // namespace metafast
