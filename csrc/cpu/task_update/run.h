// Carrying out plans on the CPU. A rule is compiled to kernels (kernels.inl), which see elements of one arithmetic type and
// nothing else; run.cpp, compiled once for all rules, feeds them.
#pragma once

#include "task_update/plan.h"

#include <cstdint>

namespace metafast::task_update {

constexpr int kMaxInputs = 11, kMaxOutputs = 7;  // of a rule

// Computes n elements of every output of n elements of every input, for one task or for two. The next task's elements lie
// `input_steps` and `output_steps` further on. `coefficients` is the rule's As<C>.
template <class C>
using Kernel = void (*)(const void* coefficients, const C* const* inputs, const int64_t* input_steps, C* const* outputs,
                        const int64_t* output_steps, int64_t n);

// `each` writes every output, for one task. `summing`, for one task and for two, add the outputs that the rule sums to what is
// there.
template <class C>
struct KernelsIn {
  Kernel<C> each, summing[2];
};

// The kernels of a rule. `sums` is a bit for each output that the rule sums; `together`, one or two, how many tasks are best
// summed over at a time.
struct Kernels {
  unsigned sums;
  int together;
  KernelsIn<float> in_float;
  KernelsIn<double> in_double;
};

// For the instruction set of this machine. Instantiated in the file of each rule.
template <class Rule>
Kernels kernels_of();

void run(const Plan& plan, const Kernels& kernels, const void* coefficients_in_float, const void* coefficients_in_double);

}  // namespace metafast::task_update
