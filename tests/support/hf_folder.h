/* tests/support/hf_folder.h - models as Hugging Face's GPT-2 files, read and written the plainest way.
 *
 * Shares nothing with the core: a file's header is parsed by cJSON, its floats are copied.  What the command writes is
 * read by this, and the loss of what is in it computed by the reference.  Ends the test program with a message. */
#ifndef HF_FOLDER_H
#define HF_FOLDER_H
#include <stdint.h>

#include "reference_gpt.h"

typedef struct hf_tensor { /* F32 */
  char name[96];
  int ndim;
  int64_t shape[4], numel;
  float *data;
} hf_tensor;

typedef struct hf_file {
  hf_tensor *tensors; /* (n) in the order of the file */
  int n;
  char metadata[256]; /* the text of "__metadata__", "" without */
} hf_file;

hf_file hf_read(const char *path);
void hf_free(hf_file *f);
hf_tensor *hf_find(hf_file *f, const char *name); /* NULL: none */
/* Tensors [from, to). */
void hf_write(const hf_file *f, int from, int to, const char *path);
/* The model of DIR/config.json and DIR/model.safetensors, ready to run. */
reference_gpt *hf_reference(const char *dir);
#endif
