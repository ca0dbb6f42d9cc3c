/* tests/support/training.h - small training runs through the command, on data made from a formula. */
#ifndef TEST_TRAINING_H
#define TEST_TRAINING_H
#include <cjson/cJSON.h>

#include "command.h"

/* Writes train.bin and valid.bin (raw uint16 below 257) and run.ini into dir.  `extra` is appended to the INI. */
void training_files(const char *dir, const char *extra);
/* The INI of a model that divides by nothing: width 30, vocabulary 257, context 33, more than 100 canonical blocks.
 * The [model] section stands last, so that keys may be appended. */
extern const char training_odd_model[];
/* run.json or compare.json of a run in dir; NULL when it is not there.  Freed with cJSON_Delete. */
cJSON *training_json(const char *dir, const char *name);
/* Member by path "a.b.c". */
const cJSON *training_get(const cJSON *o, const char *path);
/* cr_asserts that planned and measured bytes and traffic of a result object are equal on every rank, and that the
 * steady state made no call to the host's allocator. */
void training_check_plan(const cJSON *result, const char *what);
#endif
