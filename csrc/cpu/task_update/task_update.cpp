// Task updates on the CPU: one pass over memory. The items of a plan are cut into chunks, chunks of all items are
// shared out among the threads, and a chunk goes through the rule in strips that stay in the first-level cache. The cut
// depends on shapes alone, and sums are added in its order: results do not depend on the number of threads.

#include "task_update_ops.h"

#include "cpu/isa/capability.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// An output overlaps no input, or lies exactly on it. (`omp simd` says so too, but makes an array of all that the loop's body refers to.)
#if defined(__clang__)
#define METAFAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define METAFAST_UNROLLED _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define METAFAST_INDEPENDENT _Pragma("GCC ivdep")
#define METAFAST_UNROLLED _Pragma("GCC unroll 2")
#else
#define METAFAST_INDEPENDENT
#define METAFAST_UNROLLED
#endif

namespace metafast::task_update {
namespace {

constexpr int64_t kStrip = 256;           // elements
constexpr int64_t kRow = 16 * kStrip;     // elements of a task before it is the next task's turn
constexpr int64_t kChunk = 64 * kStrip;   // elements times tasks, of one task
constexpr int64_t kBlock = 2 * kChunk;    // the least that is worth another thread

// Whether a rule's output is one that is mostly summed over tasks: its kernels have a variant that does so in registers.
template <class Rule>
constexpr bool is_sum(size_t output) {
  if constexpr (requires { Rule::sums; }) return Rule::sums >> output & 1;
  else return false;
}

template <class Rule>
constexpr bool has_sums = requires { Rule::sums; };

// Where it pays to go through two tasks at a time, the pointers to all rows are in registers. Sums are then read half as
// often. With four, memory is slower again.
template <class Rule>
constexpr int kTogether = Rule::inputs + Rule::outputs <= 6 ? 2 : 1;

template <class C, class Stored>
METAFAST_ELEMENT const C* load(const Stored* from, C* scratch, int64_t n) {
  if constexpr (std::is_same_v<C, Stored>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scratch[j] = static_cast<C>(from[j]);
    return scratch;
  }
}

template <class C, class Stored>
METAFAST_ELEMENT void store(const C* from, Stored* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<Stored>(from[j]);
}

// Elements of some tasks, each operand's `step` elements on from task to task; with `sums`, the outputs that the rule sums
// are added to what is there. Written without loops over operands: what is indexed by constants alone the compiler keeps
// in registers.
template <class Rule, bool sums, int tasks, class C, size_t... I, size_t... O>
METAFAST_ELEMENT void apply(const As<Rule, C>& rule, const C* const* inputs, const int64_t* input_steps,
                            C* const* outputs, const int64_t* output_steps, int64_t n, std::index_sequence<I...>,
                            std::index_sequence<O...>) {
  const C* const from[] = {inputs[I]...};
  C* const to[] = {outputs[O]...};
  const int64_t from_step[] = {input_steps[I]...}, to_step[] = {output_steps[O]...};
  METAFAST_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    C sum[] = {(sums && is_sum<Rule>(O) ? to[O][j] : C(0))...};
    METAFAST_UNROLLED
    for (int task = 0; task < tasks; ++task) {
      const C in[] = {from[I][task * from_step[I] + j]...};
      C out[sizeof...(O)];
      Rule::element(rule, in, out);
      ((sums && is_sum<Rule>(O) ? sum[O] += out[O] : to[O][task * to_step[O] + j] = out[O]), ...);
    }
    ((sums && is_sum<Rule>(O) ? void(to[O][j] = sum[O]) : void()), ...);
  }
}

template <class Function>
auto for_type(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float: return function(float());
    case ScalarType::Double: return function(double());
    case ScalarType::BFloat16: return function(c10::BFloat16());
    case ScalarType::Half: return function(c10::Half());
    default: STD_TORCH_CHECK(false, "task_update: no kernel for tensors of type ", torch::headeronly::toString(type));
  }
}

double scalar_value(const Input& in, int64_t at = 0) {
  if (in.from == From::number) return in.value;
  return for_type(in.scalar_type, [&](auto zero) -> double { return static_cast<const decltype(zero)*>(in.data)[at]; });
}

// Whether the outputs that the rule sums are all summed over tasks, where they are wanted at all.
template <class Rule>
bool sums_tasks(const Item<Rule>& item) {
  bool some = false;
  for (int o = 0; o < Rule::outputs; ++o) {
    if (!is_sum<Rule>(o) || item.out[o].keep == Keep::nothing) continue;
    if (item.out[o].keep != Keep::task_sum) return false;
    some = true;
  }
  return some;
}

// Whether all operands are read and written where they lie, but for the outputs that the rule sums, with `sums`.
template <class Rule>
bool is_direct(const Item<Rule>& item, bool sums) {
  for (const Input& operand : item.in)
    if (operand.from < From::all_tasks) return false;
  for (int o = 0; o < Rule::outputs; ++o)
    if (item.out[o].keep != (sums && is_sum<Rule>(o) ? Keep::task_sum : Keep::each_task)) return false;
  return true;
}

// As `chunk` below, for operands that take no strips.
template <class Rule, bool sums, class C>
METAFAST_ELEMENT void direct_chunk(const As<Rule, C>& rule, const Item<Rule>& item, int64_t begin, int64_t end) {
  alignas(64) C summed[sums ? Rule::outputs : 1][sums ? kRow : 1];
  const C* in[Rule::inputs];
  C* out[Rule::outputs];
  int64_t in_step[Rule::inputs], out_step[Rule::outputs];
  for (int i = 0; i < Rule::inputs; ++i) {
    in[i] = static_cast<const C*>(item.in[i].data) + begin;
    in_step[i] = item.in[i].from == From::each_task ? item.elements : 0;
  }
  for (int o = 0; o < Rule::outputs; ++o) {
    out[o] = static_cast<C*>(item.out[o].data) + begin;
    out_step[o] = item.elements;
    if (!sums || !is_sum<Rule>(o)) continue;
    out[o] = summed[o];
    out_step[o] = 0;
    std::fill_n(summed[o], end - begin, C(0));
  }
  constexpr std::make_index_sequence<Rule::inputs> inputs;
  constexpr std::make_index_sequence<Rule::outputs> outputs;
  constexpr int together = kTogether<Rule>;
  for (int64_t task = 0; task < item.tasks; task += together) {
    if (task + together <= item.tasks)
      apply<Rule, sums, together>(rule, in, in_step, out, out_step, end - begin, inputs, outputs);
    else apply<Rule, sums, 1>(rule, in, in_step, out, out_step, end - begin, inputs, outputs);
    for (int i = 0; i < Rule::inputs; ++i) in[i] += together * in_step[i];
    for (int o = 0; o < Rule::outputs; ++o) out[o] += together * out_step[o];
  }
  for (int o = 0; o < Rule::outputs; ++o)
    if (sums && is_sum<Rule>(o)) std::copy_n(summed[o], end - begin, static_cast<C*>(item.out[o].data) + begin);
}

// Elements [begin, end) of every task of an item, at most kRow where there are several tasks; what is summed over
// everything goes into totals, one an output. A task's part of a row is gone through as a whole, as memory likes it; what
// the tasks share, and sums over them, stay in the cache meanwhile.
template <class Rule, class Stored>
METAFAST_ELEMENT void chunk(const typename Rule::Options& options, const Item<Rule>& item, int64_t begin, int64_t end,
                            double* totals) {
  using C = Arithmetic<Stored>;
  const As<Rule, C> rule(options);
  alignas(64) C loaded[Rule::inputs][kStrip], made[Rule::outputs][kStrip], sums[Rule::outputs][kRow];
  // What is absent is read from one strip, and what is not wanted written to one: the others stay in the cache.
  alignas(64) C absent[kStrip], unwanted[kStrip];
  const C* in[Rule::inputs];
  C* out[Rule::outputs];

  const bool summing = sums_tasks(item);
  if constexpr (std::is_same_v<C, Stored>) {
    if (is_direct(item, summing)) {
      if constexpr (has_sums<Rule>) {
        if (summing) return direct_chunk<Rule, true>(rule, item, begin, end);
      }
      return direct_chunk<Rule, false>(rule, item, begin, end);
    }
  }

  constexpr int64_t no_step[std::max(int(Rule::inputs), int(Rule::outputs))] = {};

  std::fill_n(absent, std::min(end - begin, kStrip), C(0));
  std::fill_n(unwanted, std::min(end - begin, kStrip), C(0));
  for (int i = 0; i < Rule::inputs; ++i) {
    const bool none = item.in[i].from == From::number && item.in[i].value == 0;
    in[i] = none ? absent : loaded[i];
    if (!none && item.in[i].from <= From::scalar)
      std::fill_n(loaded[i], std::min(end - begin, kStrip), static_cast<C>(scalar_value(item.in[i])));
  }
  for (int o = 0; o < Rule::outputs; ++o) {
    out[o] = item.out[o].keep == Keep::nothing ? unwanted : made[o];
    if (item.out[o].keep == Keep::task_sum) std::fill_n(sums[o], end - begin, C(0));
  }
  for (int64_t task = 0; task < item.tasks; ++task) {
    for (int i = 0; i < Rule::inputs; ++i) {
      if (item.in[i].from == From::task_scalar)
        std::fill_n(loaded[i], std::min(end - begin, kStrip), static_cast<C>(scalar_value(item.in[i], task)));
      else if (item.in[i].from == From::last_task)
        std::fill_n(loaded[i], std::min(end - begin, kStrip), C(task + 1 == item.tasks));
    }
    for (int64_t e = begin; e < end; e += kStrip) {
      const int64_t n = std::min(end - e, kStrip), at = task * item.elements + e;
      for (int i = 0; i < Rule::inputs; ++i) {
        if (item.in[i].from < From::all_tasks) continue;
        const int64_t offset = item.in[i].from == From::all_tasks ? e : at;
        in[i] = load(static_cast<const Stored*>(item.in[i].data) + offset, loaded[i], n);
      }
      if constexpr (std::is_same_v<C, Stored>)
        for (int o = 0; o < Rule::outputs; ++o)
          if (item.out[o].keep == Keep::each_task) out[o] = static_cast<Stored*>(item.out[o].data) + at;
      constexpr std::make_index_sequence<Rule::inputs> inputs;
      constexpr std::make_index_sequence<Rule::outputs> outputs;
      if (has_sums<Rule> && summing) {
        for (int o = 0; o < Rule::outputs; ++o)
          if (is_sum<Rule>(o) && item.out[o].keep == Keep::task_sum) out[o] = sums[o] + (e - begin);
        apply<Rule, has_sums<Rule>, 1>(rule, in, no_step, out, no_step, n, inputs, outputs);
      } else {
        apply<Rule, false, 1>(rule, in, no_step, out, no_step, n, inputs, outputs);
      }
      for (int o = 0; o < Rule::outputs; ++o) {
        if (summing && is_sum<Rule>(o)) continue;
        if (item.out[o].keep == Keep::task_sum) {
          C* const sum = sums[o] + (e - begin);
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) sum[j] += made[o][j];
        } else if (item.out[o].keep == Keep::total) {
          double total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < n; ++j) total += made[o][j];
          totals[o] += total;
        } else if (!std::is_same_v<C, Stored> && item.out[o].keep == Keep::each_task) {
          store(made[o], static_cast<Stored*>(item.out[o].data) + at, n);
        }
      }
    }
  }
  for (int o = 0; o < Rule::outputs; ++o)
    if (item.out[o].keep == Keep::task_sum)
      store(sums[o], static_cast<Stored*>(item.out[o].data) + begin, end - begin);
}

template <class Rule, class Stored>
void chunk_baseline(const typename Rule::Options& options, const Item<Rule>& item, int64_t begin, int64_t end,
                    double* totals) {
  chunk<Rule, Stored>(options, item, begin, end, totals);
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
template <class Rule, class Stored>
__attribute__((target("avx2,fma"))) void chunk_avx2(const typename Rule::Options& options, const Item<Rule>& item,
                                                    int64_t begin, int64_t end, double* totals) {
  chunk<Rule, Stored>(options, item, begin, end, totals);
}
#endif

template <class Rule>
auto chunk_kernel(ScalarType type) {
  return for_type(type, [](auto zero) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (cpu_capability() >= Capability::avx2) return &chunk_avx2<Rule, decltype(zero)>;
#endif
    return &chunk_baseline<Rule, decltype(zero)>;
  });
}

// Memory that was never touched costs a fault for each page, several times what the update does. With huge pages, which
// Linux may only give to those who ask, faults are few. Results often lie one after the other: neighbours ask together.
template <class Rule>
void ask_for_huge_pages(const Plan<Rule>& plan) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kHugePage = uintptr_t(1) << 21, kWorthwhile = 2 * kHugePage;
  struct Range {
    uintptr_t begin, end;
  };
  std::vector<Range> ranges;
  for (const Item<Rule>& item : plan.items)
    for (const Output& out : item.out) {
      if (!out.fresh || item.elements == 0) continue;
      const int64_t tasks = out.keep == Keep::each_task ? item.tasks : 1;
      const int64_t size = for_type(item.type, [](auto zero) { return int64_t(sizeof(zero)); });
      const auto begin = reinterpret_cast<uintptr_t>(out.data);
      ranges.push_back({begin, begin + uintptr_t(tasks * item.elements * size)});
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

// Calls `work` for each of `count` blocks. Every thread goes through a range of its own, as memory likes it, and then
// helps with the others': one that is slow, as its pages are cleared first or its core serves others too, is not waited for.
template <class Work>
void share_out(size_t count, const Work& work) {
  struct alignas(64) Share {
    std::atomic<size_t> next;
    size_t end;
  };
  const size_t threads = std::max<size_t>(1, std::min<size_t>(count, torch::stable::get_num_threads()));
  std::vector<Share> shares(threads);
  for (size_t t = 0; t < threads; ++t) {
    shares[t].next = t * count / threads;
    shares[t].end = (t + 1) * count / threads;
  }
  torch::stable::parallel_for(0, int64_t(threads), 1, [&](int64_t first, int64_t last) {
    for (size_t t = size_t(first); t < size_t(last); ++t)
      for (size_t other = 0; other < threads; ++other) {
        Share& share = shares[(t + other) % threads];
        for (size_t block; (block = share.next++) < share.end;) work(block);
      }
  });
}

struct Chunk {
  size_t item;
  int64_t begin, end;
};

struct Cpu {
  template <class Rule>
  static void run(const Plan<Rule>& plan, const typename Rule::Options& options) {
    ask_for_huge_pages(plan);
    std::vector<Chunk> chunks;
    std::vector<size_t> blocks;  // the first chunk of each
    int64_t work = kBlock;
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const Item<Rule>& item = plan.items[i];
      const int64_t tasks = std::max<int64_t>(item.tasks, 1);
      const int64_t length = tasks == 1 ? kChunk : kRow;
      for (int64_t begin = 0; begin < item.elements; begin += length) {
        if (work >= kBlock) {
          blocks.push_back(chunks.size());
          work = 0;
        }
        const int64_t end = std::min(begin + length, item.elements);
        work += (end - begin) * tasks;
        chunks.push_back({i, begin, end});
      }
    }
    const size_t block_count = blocks.size();
    blocks.push_back(chunks.size());

    std::vector<decltype(chunk_kernel<Rule>(ScalarType::Float))> kernels;
    for (const Item<Rule>& item : plan.items) kernels.push_back(chunk_kernel<Rule>(item.type));
    std::vector<double> totals(plan.scalars.empty() ? 0 : chunks.size() * Rule::outputs);
    share_out(block_count, [&](size_t block) {
      for (size_t c = blocks[block]; c < blocks[block + 1]; ++c) {
        const Chunk& part = chunks[c];
        double* sums = totals.empty() ? nullptr : &totals[c * Rule::outputs];
        kernels[part.item](options, plan.items[part.item], part.begin, part.end, sums);
      }
    });

    if (plan.scalars.empty()) return;
    std::vector<double> scalars(plan.scalars.size());
    for (size_t c = 0; c < chunks.size(); ++c)
      for (int o = 0; o < Rule::outputs; ++o) {
        const Output& out = plan.items[chunks[c].item].out[o];
        if (out.keep == Keep::total) scalars[out.scalar] += totals[c * Rule::outputs + o];
      }
    for (size_t s = 0; s < scalars.size(); ++s)
      for_type(plan.scalars[s].scalar_type(), [&](auto zero) {
        using Stored = decltype(zero);
        *static_cast<Stored*>(plan.scalars[s].data_ptr()) = static_cast<Stored>(scalars[s]);
      });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  register_kernels<Cpu>(m);
}

}  // namespace metafast::task_update
