// The kernels of RMSprop.

#include "cpu/task_update/kernels.inl"

namespace metafast::task_update {

template Kernels kernels_of<RmspropUpdate>();
template Kernels kernels_of<RmspropVjp<false>>();
template Kernels kernels_of<RmspropVjp<true>>();

}  // namespace metafast::task_update
