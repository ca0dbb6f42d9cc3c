/* core/checkpoint/elements.h - parameters and tensors of files as runs of fp32 elements, and matrices read the other
 * way.  [main] */
#ifndef PHX__ELEMENTS_H
#define PHX__ELEMENTS_H
#include "checkpoint/manifest.h"
#include "checkpoint/safetensors.h"

enum { PHX__TOOL_PATH = 4200, PHX__TOOL_PART = 1 << 18, /* elements handled at once */
       PHX__TOOL_BAND_BYTES = 64 << 20 /* memory for transposing: matrices beyond it are read several times */ };

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
