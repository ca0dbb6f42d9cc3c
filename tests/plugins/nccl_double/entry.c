/* entry.c - plugins/nccl under a name of its own: a plugin's id is that of its file. */
#define phx_plugin_v1 nccl_entry
#include "nccl.c"
#undef phx_plugin_v1

PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) {
  static phx_plugin renamed;
  renamed = *nccl_entry();
  renamed.id = "nccl_double";
  renamed.summary = "Test only: nccl on doubles of NCCL and of the CUDA runtime.";
  return &renamed;
}
