/* core/command_checkpoint.h - what the parts of `phalanx checkpoint` share.  [main] */
#ifndef PHX__COMMAND_CHECKPOINT_H
#define PHX__COMMAND_CHECKPOINT_H
#include <stdio.h>

#include "checkpoint_gone.h"
#include "gpt2.h"
#include "manifest.h"

enum { PHX__TOOL_PATH = 4200, PHX__TOOL_PART = 1 << 18, /* elements handled at once */
       PHX__TOOL_BAND_BYTES = 64 << 20 /* memory for transposing: matrices beyond it are read several times */ };

/* argv[0] is the part's name. */
int phx__checkpoint_export(int argc, char **argv);
int phx__checkpoint_import(int argc, char **argv);
int phx__checkpoint_diff(int argc, char **argv);

/* The status of a call that writes: what is PHX_IO there is no damage, but PHX_STATE here. */
phx_status phx__writing(phx_status status);
/* Prints the error; 4 for damage (PHX_IO), 3 for what could not be written (PHX_STATE), else 2. */
int phx__checkpoint_refuse(phx_status status, const phx_error *err);
/* Message, newline, status 2. */
int phx__checkpoint_usage(const char *usage);
/* A checkpoint's directory: path itself, or the latest one of the run that path is. */
phx_status phx__checkpoint_resolve(const char *path, char out[PHX__TOOL_PATH], phx_error *err);

/* resolve, and opens it; where the run that path is has removed it in between, its next latest one. */
phx_status phx__checkpoint_resolve_open(const char *path, char out[PHX__TOOL_PATH], phx__sighting *seen,
                                        phx__checkpoint_reader **reader, phx_error *err);

/* Elements [first, first + numel) of something long. */
typedef phx_status phx__element_fn(void *ctx, int64_t first, int64_t numel, float *out, phx_error *err);

typedef struct phx__param_source { /* a parameter's weights, or one of its optimizer states */
  phx__checkpoint_reader *reader;
  const phx__manifest_param *param;
  int32_t kind;
  uint32_t index;
  float *blocks; /* (PHX__TOOL_PART + 2 * PHX_BLOCK) scratch of the caller */
  bool finite;   /* NaN and infinity are refused by name: PHX_INVALID */
} phx__param_source;
phx_status phx__param_elements(void *param_source, int64_t first, int64_t numel, float *out, phx_error *err);

typedef struct phx__tensor_source { /* a tensor of F32, F16 or BF16 */
  const phx__safetensors *file;
  const phx__tensor *tensor;
  unsigned char *raw; /* (PHX__TOOL_PART * 4) scratch of the caller */
  bool finite;        /* NaN and infinity are refused by name: PHX_INVALID */
} phx__tensor_source;
phx_status phx__tensor_elements(void *tensor_source, int64_t first, int64_t numel, float *out, phx_error *err);

typedef struct phx__transposer { /* reads (rows, columns) as (columns, rows) */
  phx__element_fn *read;
  void *ctx;
  int64_t rows, columns; /* of what is read */
  int64_t band_first, band_n, room;
  float *band, *line;
} phx__transposer;
phx_status phx__transposer_open(phx__transposer *t, phx_error *err); /* read, ctx, rows, columns are set */
void phx__transposer_close(phx__transposer *t);
phx_status phx__transposed_elements(void *transposer, int64_t first, int64_t numel, float *out, phx_error *err);
#endif
