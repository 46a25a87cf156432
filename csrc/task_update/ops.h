// The ops: each makes a plan of its arguments and has it run. Their schemas, and what the arguments are, are in
// metafast/ops/task_update/library.py. An op is written once and registered in several forms, which differ in where the
// results go.
#pragma once

#include "task_update/plan.h"
#include "task_update/rules.h"

namespace metafast::task_update {

// What an op made: nothing where it wrote into tensors that were there.
template <size_t count>
using Results = std::array<Tensors, count>;

// The lists of tensors that an op's results are written into; null for new tensors.
template <size_t count>
using Into = std::array<const Tensors*, count>;

template <class Kernels, bool learned>
Results<2> plain_sgd_update(const Into<2>& into, const Tensors& params, const Tensors& grads, const Tensors& lrs,
                            const PlainSgd& rule) {
  using Rule = PlainSgdUpdate<learned>;
  Planner planner(grads, Rule::inputs, Rule::outputs);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  if constexpr (learned) planner.read_rate(Rule::lr, lrs, rule.lr);
  Tensors made = planner.write(Rule::new_param, into[0]);
  Kernels::template run<Rule>(planner.finished(), rule);
  return {std::move(made)};
}

template <class Kernels>
Results<2> sgd_update(
    const Into<2>& into,
    const Tensors& params, const Tensors& grads, const Tensors& buffers, const Tensors& lrs, const Tensors& decays,
    double lr, double momentum, double dampening, bool nesterov, double weight_decay, bool maximize) {
  if (momentum == 0 && decays.empty()) {
    const auto update = lrs.empty() ? &plain_sgd_update<Kernels, false> : &plain_sgd_update<Kernels, true>;
    return update(into, params, grads, lrs, PlainSgd{lr, weight_decay, maximize});
  }
  using Rule = SgdUpdate;
  Planner planner(grads, Rule::inputs, Rule::outputs);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::buffer, buffers);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  Results<2> made;
  made[0] = planner.write(Rule::new_param, into[0]);
  if (momentum != 0) made[1] = planner.write(Rule::new_buffer, into[1]);
  Kernels::template run<Rule>(planner.finished(), Sgd(momentum, dampening, nesterov, maximize, buffers.empty()));
  return made;
}

template <class Kernels, bool of_param, bool learned>
Results<5> plain_sgd_update_vjp(
    const Into<5>& into, const Tensors& d_params, const Tensors& grads, const Tensors& lrs, const PlainSgd& rule,
    const std::vector<bool>& shared, bool of_grad) {
  using Rule = PlainSgdVjp<of_param, learned>;
  Planner planner(d_params, Rule::inputs, Rule::outputs);
  planner.read(Rule::d_param, d_params);
  Results<5> made;
  if constexpr (of_param) made[0] = planner.write(Rule::to_param, into[0], shared);
  if (of_grad) made[1] = planner.write(Rule::to_grad, into[1]);
  if constexpr (learned) {
    planner.read(Rule::grad, grads);
    planner.read_rate(Rule::lr, lrs, rule.lr);
    made[3] = planner.write_rate(Rule::to_lr, lrs, into[3]);
  }
  Kernels::template run<Rule>(planner.finished(), rule);
  return made;
}

template <class Kernels, bool learned>
Results<5> sgd_update_vjp_of(
    const Into<5>& into, const Tensors& d_params, const Tensors& d_buffers, const Tensors& params, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay, const Sgd& rule,
    const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = SgdVjp<learned>;
  Planner planner(d_params, Rule::inputs, Rule::outputs);
  planner.read(Rule::d_param, d_params);
  planner.read(Rule::d_buffer, d_buffers);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  if constexpr (learned) {
    planner.read(Rule::param, params, Shape::either);
    planner.read(Rule::grad, grads);
    planner.read(Rule::buffer, buffers);
  }
  Results<5> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, into[0], shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad, into[1]);
  if (needed[2]) made[2] = planner.write(Rule::to_buffer, into[2]);
  if constexpr (learned) {
    if (needed[3]) made[3] = planner.write_rate(Rule::to_lr, lrs, into[3]);
    if (needed[4]) made[4] = planner.write_rate(Rule::to_weight_decay, decays, into[4]);
  }
  Kernels::template run<Rule>(planner.finished(), rule);
  return made;
}

template <class Kernels>
Results<5> sgd_update_vjp(
    const Into<5>& into, const Tensors& d_params, const Tensors& d_buffers, const Tensors& params, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, const Tensors& decays, double lr, double momentum, double dampening,
    bool nesterov, double weight_decay, bool maximize, bool first, const std::vector<bool>& shared,
    const std::vector<bool>& needed) {
  STD_TORCH_CHECK(shared.size() == d_params.size() && needed.size() == 5,
                  "sgd_update_vjp: expected shared for each parameter and needed for each of five groups");
  const bool learned = needed[3] && !lrs.empty();
  if (momentum == 0 && !needed[2] && decays.empty() && (learned ? weight_decay == 0 : lrs.empty())) {
    const auto product = needed[0] ? learned ? &plain_sgd_update_vjp<Kernels, true, true>
                                             : &plain_sgd_update_vjp<Kernels, true, false>
                         : learned ? &plain_sgd_update_vjp<Kernels, false, true>
                                   : &plain_sgd_update_vjp<Kernels, false, false>;
    return product(into, d_params, grads, lrs, PlainSgd{lr, weight_decay, maximize}, shared, needed[1]);
  }
  const Sgd rule(momentum, dampening, nesterov, maximize, first);
  const auto product = needed[3] || needed[4] ? &sgd_update_vjp_of<Kernels, true> : &sgd_update_vjp_of<Kernels, false>;
  return product(into, d_params, d_buffers, params, grads, buffers, lrs, decays, lr, weight_decay, rule, shared,
                 needed);
}

template <class Kernels, class Rule>
Results<4> adam_update_of(
    const Into<4>& into, const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay,
    const Adam& rule) {
  Planner planner(grads, Rule::inputs, Rule::outputs);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::average, averages);
  planner.read(Rule::square, squares);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  Results<4> made;
  made[0] = planner.write(Rule::new_param, into[0]);
  made[1] = planner.write(Rule::new_average, into[1]);
  made[2] = planner.write(Rule::new_square, into[2]);
  if constexpr (Rule::outputs > 3) {
    planner.read(Rule::greatest, greatest);
    made[3] = planner.write(Rule::new_greatest, into[3]);
  }
  Kernels::template run<Rule>(planner.finished(), rule);
  return made;
}

template <class Kernels>
Results<4> adam_update(
    const Into<4>& into, const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double beta1, double beta2,
    double eps, double eps_root, double weight_decay, bool amsgrad, bool maximize, bool decoupled, int64_t step) {
  const Adam rule(beta1, beta2, eps, eps_root, maximize, decoupled, step);
  const auto update =
      amsgrad ? &adam_update_of<Kernels, AdamUpdate<true>> : &adam_update_of<Kernels, AdamUpdate<false>>;
  return update(into, params, grads, averages, squares, greatest, lrs, decays, lr, weight_decay, rule);
}

template <class Kernels, bool amsgrad, bool learned>
Results<7> adam_update_vjp_of(
    const Into<7>& into,
    const Tensors& d_params, const Tensors& d_averages, const Tensors& d_squares, const Tensors& d_greatest,
    const Tensors& params, const Tensors& grads, const Tensors& averages, const Tensors& squares,
    const Tensors& greatest, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay,
    const Adam& rule, const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = AdamVjp<amsgrad, learned>;
  Planner planner(d_params, Rule::inputs, Rule::outputs);
  planner.read(Rule::d_param, d_params);
  planner.read(Rule::d_average, d_averages);
  planner.read(Rule::d_square, d_squares);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::average, averages);
  planner.read(Rule::square, squares);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  Results<7> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, into[0], shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad, into[1]);
  if (needed[2]) made[2] = planner.write(Rule::to_average, into[2]);
  if (needed[3]) made[3] = planner.write(Rule::to_square, into[3]);
  if constexpr (amsgrad) {
    planner.read(Rule::greatest, greatest);
    planner.read(Rule::d_greatest, d_greatest);
    if (needed[4]) made[4] = planner.write(Rule::to_greatest, into[4]);
  }
  if constexpr (learned) {
    if (needed[5]) made[5] = planner.write_rate(Rule::to_lr, lrs, into[5]);
    if (needed[6]) made[6] = planner.write_rate(Rule::to_weight_decay, decays, into[6]);
  }
  Kernels::template run<Rule>(planner.finished(), rule);
  return made;
}

template <class Kernels>
Results<7> adam_update_vjp(
    const Into<7>& into,
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
  return product(into, d_params, d_averages, d_squares, d_greatest, params, grads, averages, squares, greatest, lrs,
                 decays, lr, weight_decay, rule, shared, needed);
}

template <class Kernels>
Results<4> rmsprop_update(
    const Into<4>& into, const Tensors& params, const Tensors& grads, const Tensors& squares, const Tensors& buffers,
    const Tensors& averages, const Tensors& lrs, const Tensors& decays, double lr, double alpha, double eps,
    double weight_decay, double momentum, bool centered, bool maximize) {
  using Rule = RmspropUpdate;
  Planner planner(grads, Rule::inputs, Rule::outputs);
  planner.read(Rule::param, params, Shape::either);
  planner.read(Rule::grad, grads);
  planner.read(Rule::square, squares);
  planner.read(Rule::buffer, buffers);
  planner.read(Rule::average, averages);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  Results<4> made;
  made[0] = planner.write(Rule::new_param, into[0]);
  made[1] = planner.write(Rule::new_square, into[1]);
  if (momentum != 0) made[2] = planner.write(Rule::new_buffer, into[2]);
  if (centered) made[3] = planner.write(Rule::new_average, into[3]);
  Kernels::template run<Rule>(planner.finished(), Rmsprop(alpha, eps, momentum, centered, maximize));
  return made;
}

template <class Kernels, bool learned>
Results<7> rmsprop_update_vjp_of(
    const Into<7>& into,
    const Tensors& d_params, const Tensors& d_squares, const Tensors& d_buffers, const Tensors& d_averages,
    const Tensors& params, const Tensors& grads, const Tensors& squares, const Tensors& buffers,
    const Tensors& averages, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay,
    const Rmsprop& rule, const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = RmspropVjp<learned>;
  Planner planner(d_params, Rule::inputs, Rule::outputs);
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
  Results<7> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, into[0], shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad, into[1]);
  if (needed[2]) made[2] = planner.write(Rule::to_square, into[2]);
  if (needed[3]) made[3] = planner.write(Rule::to_buffer, into[3]);
  if (needed[4]) made[4] = planner.write(Rule::to_average, into[4]);
  if constexpr (learned) {
    planner.read(Rule::buffer, buffers);
    if (needed[5]) made[5] = planner.write_rate(Rule::to_lr, lrs, into[5]);
    if (needed[6]) made[6] = planner.write_rate(Rule::to_weight_decay, decays, into[6]);
  }
  Kernels::template run<Rule>(planner.finished(), rule);
  return made;
}

template <class Kernels>
Results<7> rmsprop_update_vjp(
    const Into<7>& into,
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
  return product(into, d_params, d_squares, d_buffers, d_averages, params, grads, squares, buffers, averages, lrs,
                 decays, lr, weight_decay, rule, shared, needed);
}

template <size_t>
using List = const Tensors&;

// The forms of an op, as the dispatcher calls them.
template <auto op, class = decltype(op)>
struct Forms;

template <auto op, size_t count, class... Arguments>
struct Forms<op, Results<count> (*)(const Into<count>&, Arguments...)> {
  static auto made(Arguments... arguments) { return std::tuple_cat(op({}, arguments...)); }

  template <class>
  struct Out;

  template <size_t... number>
  struct Out<std::index_sequence<number...>> {
    static void call(Arguments... arguments, List<number>... given) { op({&given...}, arguments...); }
  };

  static constexpr auto out = &Out<std::make_index_sequence<count>>::call;
};

template <class Kernels, class Library>
void register_kernels(Library& library) {
  using Sgd = Forms<&sgd_update<Kernels>>;
  library.impl("sgd_update", TORCH_BOX(&Sgd::made));
  library.impl("sgd_update.out", TORCH_BOX(Sgd::out));
  using SgdVjp = Forms<&sgd_update_vjp<Kernels>>;
  library.impl("sgd_update_vjp", TORCH_BOX(&SgdVjp::made));
  library.impl("sgd_update_vjp.out", TORCH_BOX(SgdVjp::out));
  using Adam = Forms<&adam_update<Kernels>>;
  library.impl("adam_update", TORCH_BOX(&Adam::made));
  library.impl("adam_update.out", TORCH_BOX(Adam::out));
  using AdamVjp = Forms<&adam_update_vjp<Kernels>>;
  library.impl("adam_update_vjp", TORCH_BOX(&AdamVjp::made));
  library.impl("adam_update_vjp.out", TORCH_BOX(AdamVjp::out));
  using Rmsprop = Forms<&rmsprop_update<Kernels>>;
  library.impl("rmsprop_update", TORCH_BOX(&Rmsprop::made));
  library.impl("rmsprop_update.out", TORCH_BOX(Rmsprop::out));
  using RmspropVjp = Forms<&rmsprop_update_vjp<Kernels>>;
  library.impl("rmsprop_update_vjp", TORCH_BOX(&RmspropVjp::made));
  library.impl("rmsprop_update_vjp.out", TORCH_BOX(RmspropVjp::out));
}

}  // namespace metafast::task_update
