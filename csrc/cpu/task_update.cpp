// Task updates on the CPU: one pass over memory. The items of a plan are cut into chunks, chunks of all items are
// shared out among the threads, and a chunk goes through the rule in strips that stay in the first-level cache. The cut
// depends on shapes alone, and sums are added in its order: results do not depend on the number of threads.

#include "task_update_ops.h"

#include "cpu/capability.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// An output overlaps no input, or lies exactly on it. (`omp simd` says so too, but makes an array of all that the loop's body refers to.)
#if defined(__clang__)
#define METAFAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define METAFAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define METAFAST_INDEPENDENT
#endif

namespace metafast::task_update {
namespace {

constexpr int64_t kStrip = 512;           // elements
constexpr int64_t kChunk = 32 * kStrip;   // elements times tasks
constexpr int64_t kBlock = 2 * kChunk;    // the least that is worth another thread

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

// Written without loops over operands: what is indexed by constants alone the compiler keeps in registers.
template <class Rule, class C, size_t... I, size_t... O>
METAFAST_ELEMENT void apply(const As<Rule, C>& rule, const C* const* inputs, C* const* outputs, int64_t n,
                            std::index_sequence<I...>, std::index_sequence<O...>) {
  const C* const from[] = {inputs[I]...};
  C* const to[] = {outputs[O]...};
  METAFAST_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const C in[] = {from[I][j]...};
    C out[sizeof...(O)];
    Rule::element(rule, in, out);
    ((to[O][j] = out[O]), ...);
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

// Elements [begin, end) of every task of an item; what is summed over everything goes into totals, one an output.
template <class Rule, class Stored>
METAFAST_ELEMENT void chunk(const typename Rule::Options& options, const Item<Rule>& item, int64_t begin, int64_t end,
                            double* totals) {
  using C = Arithmetic<Stored>;
  const As<Rule, C> rule(options);
  alignas(64) C loaded[Rule::inputs][kStrip], made[Rule::outputs][kStrip], sums[Rule::outputs][kStrip];
  const C* in[Rule::inputs];
  C* out[Rule::outputs];

  for (int i = 0; i < Rule::inputs; ++i) {
    in[i] = loaded[i];
    if (item.in[i].from <= From::scalar)
      std::fill_n(loaded[i], std::min(end - begin, kStrip), static_cast<C>(scalar_value(item.in[i])));
  }
  for (int64_t e = begin; e < end; e += kStrip) {
    const int64_t n = std::min(end - e, kStrip);
    const auto source = [&](int i, int64_t task) {
      return static_cast<const Stored*>(item.in[i].data) + task * item.elements + e;
    };
    const auto target = [&](int o, int64_t task) {
      return static_cast<Stored*>(item.out[o].data) + task * item.elements + e;
    };
    for (int i = 0; i < Rule::inputs; ++i)
      if (item.in[i].from == From::all_tasks) in[i] = load(source(i, 0), loaded[i], n);
    for (int o = 0; o < Rule::outputs; ++o)
      if (item.out[o].keep == Keep::task_sum) std::fill_n(sums[o], n, C(0));

    for (int64_t task = 0; task < item.tasks; ++task) {
      for (int i = 0; i < Rule::inputs; ++i) {
        if (item.in[i].from == From::each_task) in[i] = load(source(i, task), loaded[i], n);
        else if (item.in[i].from == From::task_scalar)
          std::fill_n(loaded[i], n, static_cast<C>(scalar_value(item.in[i], task)));
        else if (item.in[i].from == From::last_task) std::fill_n(loaded[i], n, C(task + 1 == item.tasks));
      }
      for (int o = 0; o < Rule::outputs; ++o) {
        out[o] = made[o];
        if constexpr (std::is_same_v<C, Stored>)
          if (item.out[o].keep == Keep::each_task) out[o] = target(o, task);
      }
      apply<Rule, C>(rule, in, out, n, std::make_index_sequence<Rule::inputs>(),
                     std::make_index_sequence<Rule::outputs>());
      for (int o = 0; o < Rule::outputs; ++o) {
        if (item.out[o].keep == Keep::task_sum) {
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) sums[o][j] += made[o][j];
        } else if (item.out[o].keep == Keep::total) {
          double total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < n; ++j) total += made[o][j];
          totals[o] += total;
        } else if (!std::is_same_v<C, Stored> && item.out[o].keep == Keep::each_task) {
          store(made[o], target(o, task), n);
        }
      }
    }
    for (int o = 0; o < Rule::outputs; ++o)
      if (item.out[o].keep == Keep::task_sum) store(sums[o], target(o, 0), n);
  }
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

struct Chunk {
  size_t item;
  int64_t begin, end;
};

struct Cpu {
  template <class Rule>
  static void run(const Plan<Rule>& plan, const typename Rule::Options& options) {
    std::vector<Chunk> chunks;
    std::vector<size_t> blocks;  // the first chunk of each
    int64_t work = kBlock;
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const Item<Rule>& item = plan.items[i];
      const int64_t tasks = std::max<int64_t>(item.tasks, 1);
      const int64_t length = std::max(kChunk / tasks / kStrip, int64_t(1)) * kStrip;
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
    torch::stable::parallel_for(0, int64_t(block_count), 1, [&](int64_t first, int64_t last) {
      for (size_t c = blocks[first]; c < blocks[last]; ++c) {
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
