// The ops: each makes a plan of its arguments and has it run. Their schemas, and what the arguments are, are in
// metafast/ops/task_update/library.py. Updates in place return no tensors for what they wrote over.
#pragma once

#include "task_update.h"
#include "task_update_rules.h"

namespace metafast::task_update {

template <class Kernels, bool in_place>
Tensors plain_sgd_update(const Tensors& params, const Tensors& grads, const PlainSgd& rule) {
  using Rule = PlainSgdUpdate;
  Planner<Rule> planner(grads);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  Tensors made = planner.write(Rule::new_param, params, in_place);
  Kernels::run(planner.finished(), rule);
  return made;
}

template <class Kernels, bool in_place>
std::tuple<Tensors, Tensors> sgd_update(
    const Tensors& params, const Tensors& grads, const Tensors& buffers, const Tensors& lrs, const Tensors& decays,
    double lr, double momentum, double dampening, bool nesterov, double weight_decay, bool maximize) {
  if (momentum == 0 && lrs.empty() && decays.empty()) {
    return {plain_sgd_update<Kernels, in_place>(params, grads, PlainSgd{lr, weight_decay, maximize}), Tensors()};
  }
  using Rule = SgdUpdate;
  Planner<Rule> planner(grads);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::buffer, buffers);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  Tensors new_params = planner.write(Rule::new_param, params, in_place);
  Tensors new_buffers = momentum != 0 ? planner.write(Rule::new_buffer, buffers, in_place) : Tensors();
  Kernels::run(planner.finished(), Sgd(momentum, dampening, nesterov, maximize, buffers.empty()));
  return {std::move(new_params), std::move(new_buffers)};
}

template <class Kernels, bool learned>
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> sgd_update_vjp_of(
    const Tensors& d_params, const Tensors& d_buffers, const Tensors& params, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay, const Sgd& rule,
    const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = SgdVjp<learned>;
  Planner<Rule> planner(d_params);
  planner.read(Rule::d_param, d_params);
  planner.read(Rule::d_buffer, d_buffers);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  if constexpr (learned) {
    planner.read(Rule::param, params, Shape::either);
    planner.read(Rule::grad, grads);
    planner.read(Rule::buffer, buffers);
  }
  std::array<Tensors, 5> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad);
  if (needed[2]) made[2] = planner.write(Rule::to_buffer);
  if constexpr (learned) {
    if (needed[3]) made[3] = planner.write_rate(Rule::to_lr, lrs);
    if (needed[4]) made[4] = planner.write_rate(Rule::to_weight_decay, decays);
  }
  Kernels::run(planner.finished(), rule);
  return {std::move(made[0]), std::move(made[1]), std::move(made[2]), std::move(made[3]), std::move(made[4])};
}

template <class Kernels>
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> sgd_update_vjp(
    const Tensors& d_params, const Tensors& d_buffers, const Tensors& params, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, const Tensors& decays, double lr, double momentum, double dampening,
    bool nesterov, double weight_decay, bool maximize, bool first, const std::vector<bool>& shared,
    const std::vector<bool>& needed) {
  STD_TORCH_CHECK(shared.size() == d_params.size() && needed.size() == 5,
                  "sgd_update_vjp: expected shared for each parameter and needed for each of five groups");
  const Sgd rule(momentum, dampening, nesterov, maximize, first);
  const auto product = needed[3] || needed[4] ? &sgd_update_vjp_of<Kernels, true> : &sgd_update_vjp_of<Kernels, false>;
  return product(d_params, d_buffers, params, grads, buffers, lrs, decays, lr, weight_decay, rule, shared, needed);
}

template <class Kernels, class Rule, bool in_place>
std::tuple<Tensors, Tensors, Tensors, Tensors> adam_update_of(
    const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay,
    const Adam& rule) {
  Planner<Rule> planner(grads);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::average, averages);
  planner.read(Rule::square, squares);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  std::array<Tensors, 4> made;
  made[0] = planner.write(Rule::new_param, params, in_place);
  made[1] = planner.write(Rule::new_average, averages, in_place);
  made[2] = planner.write(Rule::new_square, squares, in_place);
  if constexpr (Rule::outputs > 3) {
    planner.read(Rule::greatest, greatest);
    made[3] = planner.write(Rule::new_greatest, greatest, in_place);
  }
  Kernels::run(planner.finished(), rule);
  return {std::move(made[0]), std::move(made[1]), std::move(made[2]), std::move(made[3])};
}

template <class Kernels, bool in_place>
std::tuple<Tensors, Tensors, Tensors, Tensors> adam_update(
    const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double beta1, double beta2,
    double eps, double eps_root, double weight_decay, bool amsgrad, bool maximize, bool decoupled, int64_t step) {
  const Adam rule(beta1, beta2, eps, eps_root, maximize, decoupled, step);
  const auto update = amsgrad ? &adam_update_of<Kernels, AdamUpdate<true>, in_place>
                              : &adam_update_of<Kernels, AdamUpdate<false>, in_place>;
  return update(params, grads, averages, squares, greatest, lrs, decays, lr, weight_decay, rule);
}

using SevenLists = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

template <class Kernels, bool amsgrad, bool learned>
SevenLists adam_update_vjp_of(
    const Tensors& d_params, const Tensors& d_averages, const Tensors& d_squares, const Tensors& d_greatest,
    const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay,
    const Adam& rule, const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = AdamVjp<amsgrad, learned>;
  Planner<Rule> planner(d_params);
  planner.read(Rule::d_param, d_params);
  planner.read(Rule::d_average, d_averages);
  planner.read(Rule::d_square, d_squares);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::average, averages);
  planner.read(Rule::square, squares);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  std::array<Tensors, 7> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad);
  if (needed[2]) made[2] = planner.write(Rule::to_average);
  if (needed[3]) made[3] = planner.write(Rule::to_square);
  if constexpr (amsgrad) {
    planner.read(Rule::greatest, greatest);
    planner.read(Rule::d_greatest, d_greatest);
    if (needed[4]) made[4] = planner.write(Rule::to_greatest);
  }
  if constexpr (learned) {
    if (needed[5]) made[5] = planner.write_rate(Rule::to_lr, lrs);
    if (needed[6]) made[6] = planner.write_rate(Rule::to_weight_decay, decays);
  }
  Kernels::run(planner.finished(), rule);
  return {std::move(made[0]), std::move(made[1]), std::move(made[2]), std::move(made[3]),
          std::move(made[4]), std::move(made[5]), std::move(made[6])};
}

template <class Kernels>
SevenLists adam_update_vjp(
    const Tensors& d_params, const Tensors& d_averages, const Tensors& d_squares, const Tensors& d_greatest,
    const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double beta1, double beta2,
    double eps, double eps_root, double weight_decay, bool amsgrad, bool maximize, bool decoupled, int64_t step,
    const std::vector<bool>& shared, const std::vector<bool>& needed) {
  STD_TORCH_CHECK(shared.size() == d_params.size() && needed.size() == 7,
                  "adam_update_vjp: expected shared for each parameter and needed for each of seven groups");
  const Adam rule(beta1, beta2, eps, eps_root, maximize, decoupled, step);
  const bool learned = needed[5] || needed[6];
  // Amsgrad is rare: it always goes through the kernel that can do rates too.
  const auto product = amsgrad   ? &adam_update_vjp_of<Kernels, true, true>
                       : learned ? &adam_update_vjp_of<Kernels, false, true>
                                 : &adam_update_vjp_of<Kernels, false, false>;
  return product(d_params, d_averages, d_squares, d_greatest, params, grads, averages, squares, greatest, lrs, decays,
                 lr, weight_decay, rule, shared, needed);
}

template <class Kernels, bool in_place>
std::tuple<Tensors, Tensors, Tensors, Tensors> rmsprop_update(
    const Tensors& params, const Tensors& grads, const Tensors& squares, const Tensors& buffers,
    const Tensors& averages, const Tensors& lrs, const Tensors& decays, double lr, double alpha, double eps,
    double weight_decay, double momentum, bool centered, bool maximize) {
  using Rule = RmspropUpdate;
  Planner<Rule> planner(grads);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::square, squares);
  planner.read(Rule::buffer, buffers);
  planner.read(Rule::average, averages);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  std::array<Tensors, 4> made;
  made[0] = planner.write(Rule::new_param, params, in_place);
  made[1] = planner.write(Rule::new_square, squares, in_place);
  if (momentum != 0) made[2] = planner.write(Rule::new_buffer, buffers, in_place);
  if (centered) made[3] = planner.write(Rule::new_average, averages, in_place);
  Kernels::run(planner.finished(), Rmsprop(alpha, eps, momentum, centered, maximize));
  return {std::move(made[0]), std::move(made[1]), std::move(made[2]), std::move(made[3])};
}

template <class Kernels, bool learned>
SevenLists rmsprop_update_vjp_of(
    const Tensors& d_params, const Tensors& d_squares, const Tensors& d_buffers, const Tensors& d_averages,
    const Tensors& params, const Tensors& grads, const Tensors& squares, const Tensors& buffers,
    const Tensors& averages, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay,
    const Rmsprop& rule, const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = RmspropVjp<learned>;
  Planner<Rule> planner(d_params);
  planner.read(Rule::d_param, d_params);
  planner.read(Rule::d_square, d_squares);
  planner.read(Rule::d_buffer, d_buffers);
  planner.read(Rule::d_average, d_averages);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::square, squares);
  planner.read(Rule::average, averages);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  std::array<Tensors, 7> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad);
  if (needed[2]) made[2] = planner.write(Rule::to_square);
  if (needed[3]) made[3] = planner.write(Rule::to_buffer);
  if (needed[4]) made[4] = planner.write(Rule::to_average);
  if constexpr (learned) {
    planner.read(Rule::buffer, buffers);
    if (needed[5]) made[5] = planner.write_rate(Rule::to_lr, lrs);
    if (needed[6]) made[6] = planner.write_rate(Rule::to_weight_decay, decays);
  }
  Kernels::run(planner.finished(), rule);
  return {std::move(made[0]), std::move(made[1]), std::move(made[2]), std::move(made[3]),
          std::move(made[4]), std::move(made[5]), std::move(made[6])};
}

template <class Kernels>
SevenLists rmsprop_update_vjp(
    const Tensors& d_params, const Tensors& d_squares, const Tensors& d_buffers, const Tensors& d_averages,
    const Tensors& params, const Tensors& grads, const Tensors& squares, const Tensors& buffers,
    const Tensors& averages, const Tensors& lrs, const Tensors& decays, double lr, double alpha, double eps,
    double weight_decay, double momentum, bool centered, bool maximize, const std::vector<bool>& shared,
    const std::vector<bool>& needed) {
  STD_TORCH_CHECK(shared.size() == d_params.size() && needed.size() == 7,
                  "rmsprop_update_vjp: expected shared for each parameter and needed for each of seven groups");
  const Rmsprop rule(alpha, eps, momentum, centered, maximize);
  const auto product =
      needed[5] || needed[6] ? &rmsprop_update_vjp_of<Kernels, true> : &rmsprop_update_vjp_of<Kernels, false>;
  return product(d_params, d_squares, d_buffers, d_averages, params, grads, squares, buffers, averages, lrs, decays,
                 lr, weight_decay, rule, shared, needed);
}

template <class Kernels, bool in_place>
Tensors outer_update(const Tensors& bases, const Tensors& values, const Tensors& weights, double scale) {
  using Rule = OuterUpdate;
  Planner<Rule> planner(values);
  planner.read(Rule::base, bases, Shape::all_tasks);
  planner.read(Rule::value, values);
  planner.read_task_scalars(Rule::weight, weights, 1);
  planner.read_last_task(Rule::is_last);
  Tensors made = planner.write_sums(Rule::updated, bases, in_place);
  Kernels::run(planner.finished(), Outer{scale});
  return made;
}

template <class Kernels, class Library>
void register_kernels(Library& library) {
  library.impl("sgd_update", TORCH_BOX((&sgd_update<Kernels, false>)));
  library.impl("sgd_update_", TORCH_BOX((&sgd_update<Kernels, true>)));
  library.impl("sgd_update_vjp", TORCH_BOX(&sgd_update_vjp<Kernels>));
  library.impl("adam_update", TORCH_BOX((&adam_update<Kernels, false>)));
  library.impl("adam_update_", TORCH_BOX((&adam_update<Kernels, true>)));
  library.impl("adam_update_vjp", TORCH_BOX(&adam_update_vjp<Kernels>));
  library.impl("rmsprop_update", TORCH_BOX((&rmsprop_update<Kernels, false>)));
  library.impl("rmsprop_update_", TORCH_BOX((&rmsprop_update<Kernels, true>)));
  library.impl("rmsprop_update_vjp", TORCH_BOX(&rmsprop_update_vjp<Kernels>));
  library.impl("outer_update", TORCH_BOX((&outer_update<Kernels, false>)));
  library.impl("outer_update_", TORCH_BOX((&outer_update<Kernels, true>)));
}

}  // namespace metafast::task_update
