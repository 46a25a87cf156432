// Task updates on the CPU: one pass over memory. The items of a plan are cut into chunks, chunks of all items are
// shared out among the threads, and a chunk goes through the rule's kernels in strips that stay in the first-level cache. The
// cut depends on shapes alone, and sums are added in its order: results do not depend on the number of threads.

#include "cpu/task_update/run.h"

#include "cpu/aligned_memory.h"
#include "cpu/isa/capability.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define METAFAST_INLINE inline __attribute__((always_inline))

namespace metafast::task_update {
namespace {

constexpr int64_t kStrip = 256;           // elements
constexpr int64_t kRow = 16 * kStrip;     // elements of a task before it is the next task's turn
constexpr int64_t kChunk = 64 * kStrip;   // elements times tasks, of one task
constexpr int64_t kBlock = 2 * kChunk;    // the least that is worth another thread

template <class Function>
auto for_type(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float: return function(float());
    case ScalarType::Double: return function(double());
    case ScalarType::BFloat16: return function(c10::BFloat16());
    default: return function(c10::Half());
  }
}

int64_t size_of(ScalarType type) {
  return for_type(type, [](auto zero) { return int64_t(sizeof(zero)); });
}

double scalar_value(const Input& in) {
  if (in.from == From::number) return in.value;
  return for_type(in.scalar_type, [&](auto zero) -> double { return *static_cast<const decltype(zero)*>(in.data); });
}

// A rule in one arithmetic type.
template <class C>
struct Rule {
  unsigned sums;
  int together;
  KernelsIn<C> kernels;
  const void* coefficients;
};

// Whether elements are stored in the type of the arithmetic, and not in a smaller one.
template <class C>
bool is_stored_as(ScalarType type) {
  return type == (std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float);
}

// Elements of a half type, from `offset` on.
template <class C>
METAFAST_INLINE void load(const void* data, ScalarType type, int64_t offset, C* strip, int64_t n) {
  if (type == ScalarType::BFloat16) {
    const auto* from = static_cast<const c10::BFloat16*>(data) + offset;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) strip[j] = static_cast<C>(from[j]);
  } else {
    const auto* from = static_cast<const c10::Half*>(data) + offset;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) strip[j] = static_cast<C>(from[j]);
  }
}

template <class C>
METAFAST_INLINE void store(const C* from, void* data, ScalarType type, int64_t offset, int64_t n) {
  if (is_stored_as<C>(type)) {
    std::copy_n(from, n, static_cast<C*>(data) + offset);
  } else if (type == ScalarType::BFloat16) {
    auto* to = static_cast<c10::BFloat16*>(data) + offset;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<c10::BFloat16>(from[j]);
  } else {
    auto* to = static_cast<c10::Half*>(data) + offset;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<c10::Half>(from[j]);
  }
}

// Those of `sums`, a bit for each output, if all of them are summed over tasks where they are wanted at all; else none.
unsigned summed_outputs(unsigned sums, const Item& item) {
  bool some = false;
  for (size_t o = 0; o < item.out.size(); ++o) {
    if (!(sums >> o & 1) || item.out[o].keep == Keep::nothing) continue;
    if (item.out[o].keep != Keep::task_sum) return 0;
    some = true;
  }
  return some ? sums : 0;
}

// Whether all operands are read and written where they lie, but for the outputs that are summed.
bool is_direct(const Item& item, unsigned summed) {
  for (const Input& operand : item.in)
    if (operand.from < From::all_tasks) return false;
  for (size_t o = 0; o < item.out.size(); ++o)
    if (item.out[o].keep != (summed >> o & 1 ? Keep::task_sum : Keep::each_task)) return false;
  return true;
}

// As `chunk` below, for operands that take no strips.
template <class C>
METAFAST_INLINE void direct_chunk(const Rule<C>& rule, const Item& item, unsigned summed, int64_t begin, int64_t end,
                                  C* sums) {
  const C* in[kMaxInputs];
  C* out[kMaxOutputs];
  int64_t in_step[kMaxInputs], out_step[kMaxOutputs];
  for (size_t i = 0; i < item.in.size(); ++i) {
    in[i] = static_cast<const C*>(item.in[i].data) + begin;
    in_step[i] = item.in[i].from == From::each_task ? item.elements : 0;
  }
  for (size_t o = 0; o < item.out.size(); ++o) {
    const bool sum = summed >> o & 1;
    out[o] = sum ? sums + o * kRow : static_cast<C*>(item.out[o].data) + begin;
    out_step[o] = sum ? 0 : item.elements;
    if (sum) std::fill_n(out[o], end - begin, C(0));
  }
  for (int64_t task = 0; task < item.tasks;) {
    const int64_t tasks = summed ? std::min<int64_t>(rule.together, item.tasks - task) : 1;
    const Kernel<C> kernel = summed ? rule.kernels.summing[tasks - 1] : rule.kernels.each;
    kernel(rule.coefficients, in, in_step, out, out_step, end - begin);
    for (size_t i = 0; i < item.in.size(); ++i) in[i] += tasks * in_step[i];
    for (size_t o = 0; o < item.out.size(); ++o) out[o] += tasks * out_step[o];
    task += tasks;
  }
  for (size_t o = 0; o < item.out.size(); ++o)
    if (summed >> o & 1) std::copy_n(out[o], end - begin, static_cast<C*>(item.out[o].data) + begin);
}

// Elements [begin, end) of every task of an item, at most kRow where there are several tasks; what is summed over
// everything goes into totals, one an output, and `sums` is memory for kRow elements of each output. A task's part of a row
// is gone through as a whole, as memory likes it; what the tasks share, and sums over them, stay in the cache meanwhile.
template <class C>
METAFAST_INLINE void chunk(const Rule<C>& rule, const Item& item, int64_t begin, int64_t end, C* sums, double* totals) {
  const size_t inputs = item.in.size(), outputs = item.out.size();
  const unsigned summed = summed_outputs(rule.sums, item);
  const bool as_stored = is_stored_as<C>(item.type);  // operands are read and written where they lie
  if (as_stored && is_direct(item, summed)) return direct_chunk(rule, item, summed, begin, end, sums);

  alignas(64) C loaded[kMaxInputs][kStrip], made[kMaxOutputs][kStrip];
  // What is absent is read from one strip, and what is not wanted written to one: the others stay in the cache.
  alignas(64) C absent[kStrip], unwanted[kStrip];
  const C* in[kMaxInputs];
  C* out[kMaxOutputs];
  // How far an operand moves from strip to strip: not at all where it lies in one of those above.
  int64_t in_move[kMaxInputs], out_move[kMaxOutputs];
  bool some_made = false;
  constexpr int64_t no_step[std::max(kMaxInputs, kMaxOutputs)] = {};

  std::fill_n(absent, std::min(end - begin, kStrip), C(0));
  std::fill_n(unwanted, std::min(end - begin, kStrip), C(0));
  for (size_t i = 0; i < inputs; ++i) {
    const Input& operand = item.in[i];
    const bool none = operand.from == From::number && operand.value == 0;
    in[i] = none ? absent : loaded[i];
    in_move[i] = as_stored && operand.from >= From::all_tasks ? kStrip : 0;
    if (!none && operand.from <= From::scalar)
      std::fill_n(loaded[i], std::min(end - begin, kStrip), static_cast<C>(scalar_value(operand)));
  }
  for (size_t o = 0; o < outputs; ++o) {
    const Keep keep = item.out[o].keep;
    const bool moves = keep == Keep::task_sum ? summed >> o & 1 : keep == Keep::each_task && as_stored;
    out[o] = keep == Keep::nothing ? unwanted : made[o];
    out_move[o] = moves ? kStrip : 0;
    some_made |= out[o] == made[o] && !moves;
    if (keep == Keep::task_sum) std::fill_n(sums + o * kRow, end - begin, C(0));
  }
  const Kernel<C> kernel = summed ? rule.kernels.summing[0] : rule.kernels.each;
  for (int64_t task = 0; task < item.tasks; ++task) {
    const int64_t row = task * item.elements;
    for (size_t i = 0; i < inputs; ++i)
      if (in_move[i] != 0)
        in[i] = static_cast<const C*>(item.in[i].data) + (item.in[i].from == From::each_task ? row : 0) + begin;
    for (size_t o = 0; o < outputs; ++o)
      if (out_move[o] != 0)
        out[o] = summed >> o & 1 ? sums + o * kRow : static_cast<C*>(item.out[o].data) + row + begin;
    for (int64_t e = begin; e < end; e += kStrip) {
      const int64_t n = std::min(end - e, kStrip);
      if (!as_stored)
        for (size_t i = 0; i < inputs; ++i)
          if (item.in[i].from >= From::all_tasks)
            load(item.in[i].data, item.type, (item.in[i].from == From::each_task ? row : 0) + e, loaded[i], n);
      kernel(rule.coefficients, in, no_step, out, no_step, n);
      for (size_t i = 0; i < inputs; ++i) in[i] += in_move[i];
      for (size_t o = 0; o < outputs; ++o) out[o] += out_move[o];
      if (!some_made) continue;
      for (size_t o = 0; o < outputs; ++o) {
        if (out_move[o] != 0) continue;
        if (item.out[o].keep == Keep::task_sum) {
          C* const sum = sums + o * kRow + (e - begin);
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) sum[j] += made[o][j];
        } else if (item.out[o].keep == Keep::total) {
          double total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < n; ++j) total += made[o][j];
          totals[o] += total;
        } else if (item.out[o].keep == Keep::each_task) {
          store(made[o], item.out[o].data, item.type, row + e, n);
        }
      }
    }
  }
  for (size_t o = 0; o < outputs; ++o)
    if (item.out[o].keep == Keep::task_sum) store(sums + o * kRow, item.out[o].data, item.type, begin, end - begin);
}

template <class C>
using ChunkFunction = void (*)(const Rule<C>& rule, const Item& item, int64_t begin, int64_t end, C* sums, double* totals);

template <class C>
void chunk_baseline(const Rule<C>& rule, const Item& item, int64_t begin, int64_t end, C* sums, double* totals) {
  chunk(rule, item, begin, end, sums, totals);
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
template <class C>
__attribute__((target("avx2,fma"))) void chunk_avx2(const Rule<C>& rule, const Item& item, int64_t begin, int64_t end,
                                                    C* sums, double* totals) {
  chunk(rule, item, begin, end, sums, totals);
}
#endif

template <class C>
ChunkFunction<C> chunk_function() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  if (cpu_capability() >= Capability::avx2) return &chunk_avx2<C>;
#endif
  return &chunk_baseline<C>;
}

// Memory that was never touched costs a fault for each page, several times what the update does. With huge pages, which
// Linux may only give to those who ask, faults are few. Results often lie one after the other: neighbours ask together.
void ask_for_huge_pages(const Plan& plan) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kHugePage = uintptr_t(1) << 21, kWorthwhile = 2 * kHugePage;
  struct Range {
    uintptr_t begin, end;
  };
  std::vector<Range> ranges;
  for (const Item& item : plan.items)
    for (const Output& out : item.out) {
      if (!out.fresh || item.elements == 0) continue;
      const int64_t tasks = out.keep == Keep::each_task ? item.tasks : 1;
      const auto begin = reinterpret_cast<uintptr_t>(out.data);
      ranges.push_back({begin, begin + uintptr_t(tasks * item.elements * size_of(item.type))});
    }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t r = 0; r < ranges.size();) {
    Range joined = ranges[r];
    while (++r < ranges.size() && ranges[r].begin < joined.end + kHugePage) joined.end = ranges[r].end;
    if (joined.end - joined.begin < kWorthwhile) continue;
    // It is advice: what else lies in these pages stays as it is, and nothing is lost where there is no such advice.
    const uintptr_t first = joined.begin / kPage * kPage;
    (void)madvise(reinterpret_cast<void*>(first), joined.end - first, MADV_HUGEPAGE);
  }
#endif
}

// Calls `work(thread, block)` for each of `count` blocks. Every thread goes through a range of its own, as memory likes it, and then
// helps with the others': one that is slow, as its pages are cleared first or its core serves others too, is not waited for.
template <class Work>
void share_out(size_t count, size_t threads, const Work& work) {
  struct alignas(64) Share {
    std::atomic<size_t> next;
    size_t end;
  };
  std::vector<Share> shares(threads);
  for (size_t t = 0; t < threads; ++t) {
    shares[t].next = t * count / threads;
    shares[t].end = (t + 1) * count / threads;
  }
  torch::stable::parallel_for(0, int64_t(threads), 1, [&](int64_t first, int64_t last) {
    for (size_t t = size_t(first); t < size_t(last); ++t)
      for (size_t other = 0; other < threads; ++other) {
        Share& share = shares[(t + other) % threads];
        for (size_t block; (block = share.next++) < share.end;) work(t, block);
      }
  });
}

struct Chunk {
  size_t item;
  int64_t begin, end;
};

// The chunks of a plan, and the first chunk of each block, which a thread takes at once.
struct Chunks {
  std::vector<Chunk> chunks;
  std::vector<size_t> blocks;

  explicit Chunks(const Plan& plan) {
    int64_t work = kBlock;
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const Item& item = plan.items[i];
      const int64_t length = item.tasks == 1 ? kChunk : kRow;
      for (int64_t begin = 0; begin < item.elements; begin += length) {
        if (work >= kBlock) {
          blocks.push_back(chunks.size());
          work = 0;
        }
        const int64_t end = std::min(begin + length, item.elements);
        work += (end - begin) * std::max<int64_t>(item.tasks, 1);
        chunks.push_back({i, begin, end});
      }
    }
    blocks.push_back(chunks.size());
  }
};

bool sums_over_tasks(const Plan& plan) {
  return std::any_of(plan.outputs.begin(), plan.outputs.end(), [](const Output& out) { return out.keep == Keep::task_sum; });
}

void store_totals(const Plan& plan, const std::vector<Chunk>& chunks, const std::vector<double>& totals) {
  std::vector<double> scalars(plan.scalars.size());
  const double* total = totals.data();
  for (const Chunk& part : chunks)
    for (const Output& out : plan.items[part.item].out) {
      if (out.keep == Keep::total) scalars[out.scalar] += *total;
      ++total;
    }
  for (size_t s = 0; s < scalars.size(); ++s)
    for_type(plan.scalars[s].scalar_type(), [&](auto zero) {
      using Stored = decltype(zero);
      *static_cast<Stored*>(plan.scalars[s].data_ptr()) = static_cast<Stored>(scalars[s]);
    });
}

}  // namespace

void run(const Plan& plan, const Kernels& kernels, const void* coefficients_in_float, const void* coefficients_in_double) {
  const Rule<float> in_float = {kernels.sums, kernels.together, kernels.in_float, coefficients_in_float};
  const Rule<double> in_double = {kernels.sums, kernels.together, kernels.in_double, coefficients_in_double};
  const auto float_chunk = chunk_function<float>();
  const auto double_chunk = chunk_function<double>();

  ask_for_huge_pages(plan);
  const auto [chunks, blocks] = Chunks(plan);
  const size_t outputs = plan.items.empty() ? 0 : plan.items[0].out.size(), block_count = blocks.size() - 1;
  const size_t threads = std::max<size_t>(1, std::min<size_t>(block_count, torch::stable::get_num_threads()));
  std::vector<double> totals(plan.scalars.empty() ? 0 : chunks.size() * outputs);
  const int64_t sums_size = sums_over_tasks(plan) ? int64_t(outputs) * kRow : 0;
  const auto sums = sums_size == 0 ? nullptr : aligned_memory<double>(int64_t(threads) * sums_size);
  share_out(block_count, threads, [&](size_t thread, size_t block) {
    void* const own_sums = sums.get() + int64_t(thread) * sums_size;
    for (size_t c = blocks[block]; c < blocks[block + 1]; ++c) {
      const auto [i, begin, end] = chunks[c];
      const Item& item = plan.items[i];
      double* const own_totals = totals.empty() ? nullptr : &totals[c * outputs];
      if (item.type == ScalarType::Double)
        double_chunk(in_double, item, begin, end, static_cast<double*>(own_sums), own_totals);
      else float_chunk(in_float, item, begin, end, static_cast<float*>(own_sums), own_totals);
    }
  });
  if (!plan.scalars.empty()) store_totals(plan, chunks, totals);
}

}  // namespace metafast::task_update
