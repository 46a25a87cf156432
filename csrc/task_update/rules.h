// The formulas of each rule, for one element: `element` reads `inputs` numbers and makes `outputs` numbers of them. All
// of it is arithmetic and selections, without branches, so that every compiler vectorises it.
// metafast/ops/task_update/README.md derives the formulas.
//
// `sums`, of products, are the outputs that are mostly summed over tasks, a bit each: the CPU's kernels do that in registers.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define METAFAST_ELEMENT __host__ __device__ __forceinline__
#else
#define METAFAST_ELEMENT inline __attribute__((always_inline))
#endif

namespace metafast::task_update {

// With g the gradient, its sign and weight decay included, and b the buffer, the new buffer is momentum b + kept g and
// the step is lr (from_buffer b + from_grad g). Without momentum, as at the first step with it, the new buffer would be
// g.
struct Sgd {
  double sign, momentum, kept, from_buffer, from_grad;

  Sgd(double momentum, double dampening, bool nesterov, bool maximize, bool first)
      : sign(maximize ? -1 : 1), momentum(momentum), kept(first || momentum == 0 ? 1 : 1 - dampening),
        from_buffer(nesterov ? momentum * momentum : momentum), from_grad(nesterov ? 1 + momentum * kept : kept) {}

  template <class C>
  struct As {  // in the type of the arithmetic
    C sign, momentum, kept, from_buffer, from_grad;

    explicit As(const Sgd& rule)
        : sign(C(rule.sign)), momentum(C(rule.momentum)), kept(C(rule.kept)), from_buffer(C(rule.from_buffer)),
          from_grad(C(rule.from_grad)) {}
  };
};

struct SgdUpdate {
  using Options = Sgd;
  enum In { param, grad, buffer, lr, weight_decay, inputs };
  enum Out { new_param, new_buffer, outputs };

  template <class C>
  static METAFAST_ELEMENT void element(const Sgd::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + in[weight_decay] * in[param];
    out[new_param] = in[param] - in[lr] * (rule.from_buffer * in[buffer] + rule.from_grad * decayed);
    out[new_buffer] = rule.momentum * in[buffer] + rule.kept * decayed;
  }
};

// Without momentum and with a weight decay that is a number there is little to compute, and operands that are not there
// cost. The learning rate is a number too, or, where it is `learned`, an operand.
struct PlainSgd {
  double lr, weight_decay;
  bool maximize;

  template <class C>
  struct As {
    C lr, weight_decay, sign;

    explicit As(const PlainSgd& rule)
        : lr(C(rule.lr)), weight_decay(C(rule.weight_decay)), sign(C(rule.maximize ? -1 : 1)) {}
  };
};

template <bool learned>
struct PlainSgdUpdate {
  using Options = PlainSgd;
  enum In { param, grad, lr };
  enum Out { new_param, outputs };
  static constexpr int inputs = learned ? 3 : 2;

  template <class C>
  static METAFAST_ELEMENT void element(const PlainSgd::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + rule.weight_decay * in[param];
    if constexpr (learned) out[new_param] = in[param] - in[lr] * decayed;
    else out[new_param] = in[param] - rule.lr * decayed;
  }
};

// The vector-Jacobian product of that; of a learned rate without weight decay. `of_param` is whether the parameter's is
// wanted.
template <bool of_param, bool learned>
struct PlainSgdVjp {
  using Options = PlainSgd;
  enum In { d_param, grad, lr };
  enum Out { to_grad, to_param, to_lr = 1 + of_param };
  static constexpr int inputs = learned ? 3 : 1, outputs = 1 + of_param + learned;
  static constexpr unsigned sums = ((1u << outputs) - 1) & ~(1u << to_grad);

  template <class C>
  static METAFAST_ELEMENT void element(const PlainSgd::As<C>& rule, const C* in, C* out) {
    C rate = rule.lr;
    if constexpr (learned) rate = in[lr];
    const C d_decayed = -rate * in[d_param];
    out[to_grad] = rule.sign * d_decayed;
    if constexpr (of_param) out[to_param] = in[d_param] + rule.weight_decay * d_decayed;
    if constexpr (learned) out[to_lr] = -in[d_param] * (rule.sign * in[grad]);
  }
};

// The vector-Jacobian product. The update is linear in parameter, gradient and buffer: only where a rate is learned
// does the product need them.
template <bool learned>
struct SgdVjp {
  using Options = Sgd;
  enum In { d_param, d_buffer, lr, weight_decay, param, grad, buffer };
  enum Out { to_param, to_grad, to_buffer, to_lr, to_weight_decay };
  static constexpr int inputs = learned ? 7 : 4, outputs = learned ? 5 : 3;
  static constexpr unsigned sums = learned ? 1u << to_lr | 1u << to_weight_decay : 1u << to_param;

  template <class C>
  static METAFAST_ELEMENT void element(const Sgd::As<C>& rule, const C* in, C* out) {
    const C d_step = -in[lr] * in[d_param];
    const C d_decayed = rule.kept * in[d_buffer] + rule.from_grad * d_step;
    out[to_param] = in[d_param] + in[weight_decay] * d_decayed;
    out[to_grad] = rule.sign * d_decayed;
    out[to_buffer] = rule.momentum * in[d_buffer] + rule.from_buffer * d_step;
    if constexpr (learned) {
      const C decayed = rule.sign * in[grad] + in[weight_decay] * in[param];
      out[to_lr] = -in[d_param] * (rule.from_buffer * in[buffer] + rule.from_grad * decayed);
      out[to_weight_decay] = d_decayed * in[param];
    }
  }
};

// A root below 0, by rounding, is taken as 0; NaN stays.
template <class C>
METAFAST_ELEMENT C root(C square) {
  return std::sqrt(square < C(0) ? C(0) : square);
}

// The derivative of a root; 0 where the root is 0. There the gradient was 0 at every step, and what this is multiplied
// with vanishes faster: 0 is the limit.
template <class C>
METAFAST_ELEMENT C root_slope(C root) {
  return root > C(0) ? C(0.5) / root : C(0);
}

// With m and v the averages of the gradient g and its square: m' = beta1 m + kept1 g, v' = beta2 v + kept2 g^2, and the
// step is lr (correct1 m' / (sqrt(correct2 v' + eps_root) + eps) + decoupled weight_decay param). With amsgrad the
// greatest v' so far takes its place. `coupled` and `decoupled` say where weight decay goes: one is 1, the other 0.
struct Adam {
  double sign, beta1, kept1, beta2, kept2, correct1, correct2, eps, eps_root, coupled, decoupled;

  Adam(double beta1, double beta2, double eps, double eps_root, bool maximize, bool decoupled, int64_t step)
      : sign(maximize ? -1 : 1), beta1(beta1), kept1(1 - beta1), beta2(beta2), kept2(1 - beta2),
        correct1(1 / (1 - std::pow(beta1, double(step + 1)))), correct2(1 / (1 - std::pow(beta2, double(step + 1)))),
        eps(eps), eps_root(eps_root), coupled(!decoupled), decoupled(decoupled) {}

  template <class C>
  struct As {
    C sign, beta1, kept1, beta2, kept2, correct1, correct2, eps, eps_root, coupled, decoupled;

    explicit As(const Adam& rule)
        : sign(C(rule.sign)), beta1(C(rule.beta1)), kept1(C(rule.kept1)), beta2(C(rule.beta2)), kept2(C(rule.kept2)),
          correct1(C(rule.correct1)), correct2(C(rule.correct2)), eps(C(rule.eps)), eps_root(C(rule.eps_root)),
          coupled(C(rule.coupled)), decoupled(C(rule.decoupled)) {}
  };
};

template <bool amsgrad>
struct AdamUpdate {
  using Options = Adam;
  enum In { param, grad, average, square, lr, weight_decay, greatest };
  enum Out { new_param, new_average, new_square, new_greatest };
  static constexpr int inputs = 6 + amsgrad, outputs = 3 + amsgrad;

  template <class C>
  static METAFAST_ELEMENT void element(const Adam::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + rule.coupled * in[weight_decay] * in[param];
    const C averaged = rule.beta1 * in[average] + rule.kept1 * decayed;
    const C squared = rule.beta2 * in[square] + rule.kept2 * decayed * decayed;
    C scale = squared;
    if constexpr (amsgrad) {
      scale = squared <= in[greatest] ? in[greatest] : squared;
      out[new_greatest] = scale;
    }
    const C direction = rule.correct1 * averaged / (root(rule.correct2 * scale + rule.eps_root) + rule.eps);
    out[new_param] = in[param] - in[lr] * (direction + rule.decoupled * in[weight_decay] * in[param]);
    out[new_average] = averaged;
    out[new_square] = squared;
  }
};

// Parameters are needed for weight decay that is coupled, and where a rate is learned.
template <bool amsgrad, bool learned>
struct AdamVjp {
  using Options = Adam;
  enum In { d_param, d_average, d_square, param, grad, average, square, lr, weight_decay, greatest, d_greatest };
  enum Out { to_param, to_grad, to_average, to_square };
  static constexpr int to_greatest = 4, to_lr = 4 + amsgrad, to_weight_decay = to_lr + 1;
  static constexpr int inputs = 9 + 2 * amsgrad, outputs = 4 + amsgrad + 2 * learned;

  template <class C>
  static METAFAST_ELEMENT void element(const Adam::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + rule.coupled * in[weight_decay] * in[param];
    const C averaged = rule.beta1 * in[average] + rule.kept1 * decayed;
    const C squared = rule.beta2 * in[square] + rule.kept2 * decayed * decayed;
    C scale = squared;
    if constexpr (amsgrad) scale = squared <= in[greatest] ? in[greatest] : squared;
    const C spread = root(rule.correct2 * scale + rule.eps_root);
    const C inverse = C(1) / (spread + rule.eps);
    const C direction = rule.correct1 * averaged * inverse;

    const C d_direction = -in[lr] * in[d_param];
    const C slope = root_slope(spread);
    const C d_averaged = in[d_average] + d_direction * rule.correct1 * inverse;
    const C d_scale = -d_direction * direction * inverse * rule.correct2 * slope;
    C share = 1, d_squared = in[d_square] + d_scale, d_given = in[d_square];
    if constexpr (amsgrad) {
      const C d_max = in[d_greatest] + d_scale;
      // Half to each where they are equal, as torch.maximum has it.
      share = squared < in[greatest] ? C(0) : squared == in[greatest] ? C(0.5) : C(1);
      d_squared = in[d_square] + share * d_max;
      d_given += share * in[d_greatest];
      out[to_greatest] = (C(1) - share) * d_max;
    }
    // The direction's derivative by the gradient, through both averages. What cancels between the two, all of it but eps
    // at the first step, is left out of both.
    const C kept = rule.kept1 * (rule.correct2 * rule.beta2 * in[square] + rule.eps_root) -
        rule.correct2 * rule.kept2 * rule.beta1 * decayed * in[average];
    const C through_both = (rule.kept1 * rule.eps + C(2) * kept * slope) * inverse;
    const C d_decayed = rule.kept1 * in[d_average] + C(2) * rule.kept2 * decayed * d_given +
        d_direction * rule.correct1 * inverse * (share * through_both + (C(1) - share) * rule.kept1);
    out[to_param] = in[d_param] + in[weight_decay] * (rule.coupled * d_decayed + rule.decoupled * d_direction);
    out[to_grad] = rule.sign * d_decayed;
    out[to_average] = rule.beta1 * d_averaged;
    out[to_square] = rule.beta2 * d_squared;
    if constexpr (learned) {
      out[to_lr] = -in[d_param] * (direction + rule.decoupled * in[weight_decay] * in[param]);
      out[to_weight_decay] = (rule.coupled * d_decayed + rule.decoupled * d_direction) * in[param];
    }
  }
};

// With v the average of the squared gradient and, where `centered` is 1 and not 0, a that of the gradient: the new buffer
// is momentum b + g / (sqrt(v' - a'^2) + eps), and the step is lr times that.
struct Rmsprop {
  double sign, alpha, kept, eps, momentum, centered;

  Rmsprop(double alpha, double eps, double momentum, bool centered, bool maximize)
      : sign(maximize ? -1 : 1), alpha(alpha), kept(1 - alpha), eps(eps), momentum(momentum), centered(centered) {}

  template <class C>
  struct As {
    C sign, alpha, kept, eps, momentum, centered;

    explicit As(const Rmsprop& rule)
        : sign(C(rule.sign)), alpha(C(rule.alpha)), kept(C(rule.kept)), eps(C(rule.eps)), momentum(C(rule.momentum)),
          centered(C(rule.centered)) {}
  };
};

struct RmspropUpdate {
  using Options = Rmsprop;
  enum In { param, grad, square, buffer, average, lr, weight_decay, inputs };
  enum Out { new_param, new_square, new_buffer, new_average, outputs };

  template <class C>
  static METAFAST_ELEMENT void element(const Rmsprop::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + in[weight_decay] * in[param];
    const C squared = rule.alpha * in[square] + rule.kept * decayed * decayed;
    const C averaged = rule.centered * (rule.alpha * in[average] + rule.kept * decayed);
    const C moved = rule.momentum * in[buffer] + decayed / (root(squared - averaged * averaged) + rule.eps);
    out[new_param] = in[param] - in[lr] * moved;
    out[new_square] = squared;
    out[new_buffer] = moved;
    out[new_average] = averaged;
  }
};

template <bool learned>
struct RmspropVjp {
  using Options = Rmsprop;
  enum In { d_param, d_square, d_buffer, d_average, param, grad, square, average, lr, weight_decay, buffer };
  enum Out { to_param, to_grad, to_square, to_buffer, to_average, to_lr, to_weight_decay };
  static constexpr int inputs = 10 + learned, outputs = 5 + 2 * learned;

  template <class C>
  static METAFAST_ELEMENT void element(const Rmsprop::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + in[weight_decay] * in[param];
    const C squared = rule.alpha * in[square] + rule.kept * decayed * decayed;
    const C averaged = rule.centered * (rule.alpha * in[average] + rule.kept * decayed);
    const C spread = root(squared - averaged * averaged);
    const C inverse = C(1) / (spread + rule.eps);
    const C direction = decayed * inverse;

    const C d_moved = in[d_buffer] - in[lr] * in[d_param];
    const C slope = root_slope(spread);
    const C d_scale = -d_moved * direction * inverse * slope;
    const C d_squared = in[d_square] + d_scale;
    const C d_averaged = rule.centered * (in[d_average] - C(2) * averaged * d_scale);
    // The direction's derivative by the gradient, without what cancels between it and its spread: as in Adam.
    const C kept = rule.alpha * (in[square] - in[average] * averaged);
    const C d_decayed = d_moved * (rule.eps + C(2) * kept * slope) * inverse * inverse +
        rule.kept * (C(2) * decayed * in[d_square] + rule.centered * in[d_average]);
    out[to_param] = in[d_param] + in[weight_decay] * d_decayed;
    out[to_grad] = rule.sign * d_decayed;
    out[to_square] = rule.alpha * d_squared;
    out[to_buffer] = rule.momentum * d_moved;
    out[to_average] = rule.alpha * d_averaged;
    if constexpr (learned) {
      out[to_lr] = -in[d_param] * (rule.momentum * in[buffer] + direction);
      out[to_weight_decay] = d_decayed * in[param];
    }
  }
};

}  // namespace metafast::task_update
