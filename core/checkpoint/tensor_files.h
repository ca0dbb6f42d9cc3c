/* core/checkpoint/tensor_files.h - the tensors of a model that stand in one safetensors file, or in several with an
 * index.
 *
 * DIR/model.safetensors, or DIR/model.safetensors.index.json, which names for each tensor the file that holds it, as
 * Hugging Face writes models that are large.  After a successful open every tensor of every file is in the index and
 * the other way round.  [main] or one thread per object. */
#ifndef PHX__TENSOR_FILES_H
#define PHX__TENSOR_FILES_H
#include <stdbool.h>

#include "checkpoint/safetensors.h"

typedef struct phx__tensor_place {
  const phx__safetensors *file; /* [borrow] */
  const phx__tensor *tensor;    /* [borrow] */
  uint32_t index;               /* in `places` */
} phx__tensor_place;

typedef struct phx__tensor_files { /* read only */
  char *path;                /* of what was opened, for messages: the file, or the index */
  phx__safetensors **files;  /* (n_files) */
  uint32_t n_files;
  phx__tensor_place *places; /* (n) file by file, in the order of their bytes */
  uint32_t n;
} phx__tensor_files;

/* PHX_INVALID: DIR has neither, or both; PHX_IO: damaged, or a file is missing that the index names. */
phx_status phx__tensor_files_open(const char *dir, phx__tensor_files **out, phx_error *err);
/* One file, under any name. */
phx_status phx__tensor_files_open_one(const char *path, phx__tensor_files **out, phx_error *err);
void phx__tensor_files_close(phx__tensor_files *files); /* NULL is fine */
/* false: there is none */
bool phx__tensor_files_find(const phx__tensor_files *files, const char *name, phx__tensor_place *out);
#endif
