// The kernels of SGD.

#include "cpu/task_update/kernels.inl"

namespace metafast::task_update {

template Kernels kernels_of<PlainSgdUpdate<false>>();
template Kernels kernels_of<PlainSgdUpdate<true>>();
template Kernels kernels_of<PlainSgdVjp<false, false>>();
template Kernels kernels_of<PlainSgdVjp<false, true>>();
template Kernels kernels_of<PlainSgdVjp<true, false>>();
template Kernels kernels_of<PlainSgdVjp<true, true>>();
template Kernels kernels_of<SgdUpdate>();
template Kernels kernels_of<SgdVjp<false>>();
template Kernels kernels_of<SgdVjp<true>>();

}  // namespace metafast::task_update
