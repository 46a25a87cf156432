// The ops of the task update on the CPU, as the dispatcher knows them.

#include "cpu/task_update/run.h"
#include "task_update/ops.h"

namespace metafast::task_update {
namespace {

struct Cpu {
  template <class Rule>
  static void run(const Plan& plan, const typename Rule::Options& options) {
    static const Kernels kernels = kernels_of<Rule>();
    const As<Rule, float> in_float(options);
    const As<Rule, double> in_double(options);
    task_update::run(plan, kernels, &in_float, &in_double);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  register_kernels<Cpu>(m);
}

}  // namespace metafast::task_update
