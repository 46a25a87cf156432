// The kernels of a rule: loops over its `element`, for each arithmetic type and instruction set. Included by the file that
// instantiates kernels_of<Rule>() for its rules.

#include "cpu/isa/capability.h"
#include "cpu/task_update/run.h"
#include "task_update/rules.h"

#include <utility>

// An output overlaps no input, or lies exactly on it. (`omp simd` says so too, but makes an array of all that the loop's body
// refers to.)
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

// The outputs that a rule mostly sums over tasks, a bit each.
template <class Rule>
constexpr unsigned sums_of() {
  if constexpr (requires { Rule::sums; }) return Rule::sums;
  else return 0;
}

// How many tasks a kernel that sums over tasks goes through at a time. Two read the sums half as often, and pay where the
// pointers to all rows are in registers. With four, memory is slower again.
template <class Rule>
constexpr int kTogether = Rule::inputs + Rule::outputs <= 6 ? 2 : 1;

// Written without loops over operands: what is indexed by constants alone the compiler keeps in registers.
template <class Rule, unsigned sums, int tasks, class C, size_t... I, size_t... O>
METAFAST_ELEMENT void apply(const void* coefficients, const C* const* inputs, const int64_t* input_steps, C* const* outputs,
                            const int64_t* output_steps, int64_t n, std::index_sequence<I...>,
                            std::index_sequence<O...>) {
  const auto rule = *static_cast<const As<Rule, C>*>(coefficients);
  const C* const from[] = {inputs[I]...};
  C* const to[] = {outputs[O]...};
  const int64_t from_step[] = {input_steps[I]...}, to_step[] = {output_steps[O]...};
  METAFAST_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    C sum[] = {(sums >> O & 1 ? to[O][j] : C(0))...};
    METAFAST_UNROLLED
    for (int task = 0; task < tasks; ++task) {
      const C in[] = {from[I][task * from_step[I] + j]...};
      C out[sizeof...(O)];
      Rule::element(rule, in, out);
      ((sums >> O & 1 ? sum[O] += out[O] : to[O][task * to_step[O] + j] = out[O]), ...);
    }
    ((sums >> O & 1 ? void(to[O][j] = sum[O]) : void()), ...);
  }
}

#define METAFAST_KERNEL(NAME, TARGET)                                                                               \
  template <class Rule, unsigned sums, int tasks, class C>                                                          \
  TARGET void NAME(const void* coefficients, const C* const* inputs, const int64_t* input_steps, C* const* outputs, \
                   const int64_t* output_steps, int64_t n) {                                                        \
    apply<Rule, sums, tasks>(coefficients, inputs, input_steps, outputs, output_steps, n,                           \
                             std::make_index_sequence<Rule::inputs>(), std::make_index_sequence<Rule::outputs>());  \
  }

METAFAST_KERNEL(baseline, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define METAFAST_HAS_AVX2
METAFAST_KERNEL(avx2, __attribute__((target("avx2,fma"))))
#endif
#undef METAFAST_KERNEL

template <class Rule, unsigned sums, int tasks, class C>
Kernel<C> kernel() {
#ifdef METAFAST_HAS_AVX2
  if (cpu_capability() >= Capability::avx2) return &avx2<Rule, sums, tasks, C>;
#endif
  return &baseline<Rule, sums, tasks, C>;
}

template <class Rule, class C>
KernelsIn<C> kernels_in() {
  constexpr unsigned sums = sums_of<Rule>();
  constexpr int together = kTogether<Rule>;
  KernelsIn<C> found{kernel<Rule, 0, 1, C>(), {}};
  if constexpr (sums != 0) {
    found.summing[0] = kernel<Rule, sums, 1, C>();
    found.summing[1] = kernel<Rule, sums, together, C>();
  }
  return found;
}

template <class Rule>
Kernels kernels_of() {
  static_assert(int(Rule::inputs) <= kMaxInputs && int(Rule::outputs) <= kMaxOutputs);
  return {sums_of<Rule>(), kTogether<Rule>, kernels_in<Rule, float>(), kernels_in<Rule, double>()};
}

}  // namespace metafast::task_update
