/* core/checkpoint/model_source.h - a model's weights wherever they stand: a run, a checkpoint, a folder of Hugging
 * Face's, a file.
 *
 * A run stands for the newest of what it has: its latest checkpoint, or the final weights in model.safetensors, which
 * say their step.  Parameters have our names and shapes here, whatever stands in the files: matrices that are kept as
 * (in, out) are turned while they are read, a part at a time.  No plugin is loaded.  [main] */
#ifndef PHX__MODEL_SOURCE_H
#define PHX__MODEL_SOURCE_H
#include "checkpoint/checkpoint_gone.h"
#include "checkpoint/elements.h"
#include "checkpoint/gpt2.h"
#include "checkpoint/manifest.h"
#include "checkpoint/tensor_files.h"

enum { PHX__SOURCE_CHECKPOINT = 1, PHX__SOURCE_FOLDER, PHX__SOURCE_FILE };

typedef struct phx__source {
  int kind;
  char path[PHX__TOOL_PATH];      /* the checkpoint's directory, the folder, the file */
  char run[PHX__TOOL_PATH];       /* the run that it is of, or "" */
  int64_t step;                   /* -1: it does not say */
  phx__sighting seen;             /* of path */
  phx__checkpoint_reader *reader; /* CHECKPOINT */
  phx__tensor_files *files;       /* the others */
  bool has_config;                /* FOLDER: with a config.json, which the tensors fit */
  phx__gpt2 gpt2;                 /* with has_config */
  bool turned;                    /* matrices stand as (in, out) */
  bool finite;                    /* set by the caller: NaN and infinity are refused by name, PHX_INVALID */
  float *blocks;                  /* scratch */
  unsigned char *raw;
  phx__transposer turn;           /* of the matrix that is being read */
  phx__tensor_place turning;
} phx__source;

typedef struct phx__source_param {
  const char *name; /* [borrow] */
  uint32_t ndim;
  int64_t shape[PHX__TENSOR_DIMS], numel; /* ours */
  bool turned;                            /* it stands the other way round */
  int32_t kind;                           /* CHECKPOINT: PHX_STATE_WEIGHT or OPTIM, and its index */
  uint32_t index;
  const phx__manifest_param *param;
  phx__tensor_place place;                /* the others */
} phx__source_param;

/* PHX_INVALID: there is no model; PHX_UNSUPPORTED: a folder whose config.json says what we do not compute; PHX_IO:
 * damaged. */
phx_status phx__source_open(const char *path, phx__source **out, phx_error *err);
/* A run's final weights, in RUN/model.safetensors or its index, whatever checkpoints it has. */
phx_status phx__source_open_folder(const char *path, phx__source **out, phx_error *err);
/* DIR has model.safetensors, or its index. */
bool phx__source_is_folder(const char *dir);
void phx__source_close(phx__source *s); /* NULL is fine */
/* The status of what read it (s NULL is fine): PHX_IO where path is gone meanwhile becomes PHX_INVALID, and says so. */
phx_status phx__source_explain(const phx__source *s, phx_status status, phx_error *err);

/* What model it is, if it is a GPT-2; PHX_UNSUPPORTED: it is none. */
phx_status phx__source_gpt2(const phx__source *s, phx__gpt2 *out, phx_error *err);
uint32_t phx__source_n(const phx__source *s);
/* The i-th parameter; masks are none (false), nor is the tied head of a folder. */
bool phx__source_at(const phx__source *s, uint32_t i, phx__source_param *out);
bool phx__source_find(const phx__source *s, const char *name, phx__source_param *out);
/* state: the number of an optimizer state of a checkpoint. */
bool phx__source_find_state(const phx__source *s, const char *name, uint32_t state, phx__source_param *out);
/* Elements [first, first + numel) in our order.  In order, parameter by parameter, is cheapest. */
phx_status phx__source_read(phx__source *s, const phx__source_param *p, int64_t first, int64_t numel, float *out,
                            phx_error *err);
/* In the order of the file, for what is turned. */
phx_status phx__source_read_stored(phx__source *s, const phx__source_param *p, int64_t first, int64_t numel,
                                   float *out, phx_error *err);
#endif
