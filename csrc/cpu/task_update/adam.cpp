// The kernels of Adam and AdamW.

#include "cpu/task_update/kernels.inl"

namespace metafast::task_update {

template Kernels kernels_of<AdamUpdate<false>>();
template Kernels kernels_of<AdamUpdate<true>>();
template Kernels kernels_of<AdamVjp<false, false>>();
template Kernels kernels_of<AdamVjp<false, true>>();
template Kernels kernels_of<AdamVjp<true, true>>();

}  // namespace metafast::task_update
