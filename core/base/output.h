/* core/base/output.h - files of a run that are whole or not there, and JSON that does not lose members.  [main] */
#ifndef PHX__OUTPUT_H
#define PHX__OUTPUT_H
#include <cjson/cJSON.h>
#include <phalanx/base.h>
#include <stdbool.h>
#include <stdio.h>

struct phx__text; /* json.h */

/* Writes path.part, flushes it to the disk and renames it; on failure path is as it was and nothing is beside it. */
phx_status phx__text_write(const char *path, const char *text, phx_error *err);

/* A stream into a text of json.h: closed with fclose, and then whole unless text->failed.  NULL: there is no stream. */
FILE *phx__text_stream(struct phx__text *text);
/* A whole file, with a zero behind it (phx__free); NULL with errno: it cannot be read, or there is no memory. */
char *phx__file_text(const char *path);

/* text as a JSON string, with its quotes, into out; bytes that are no UTF-8 become '?'.  Its length, or 0: it does not
 * fit. */
size_t phx__json_quote(const char *text, char *out, size_t room);

/* cJSON's calls that build an object drop what they have no memory for: begin before building, ask before using. */
void phx__json_begin(void);
bool phx__json_lost(void);
void phx__json_append(cJSON *array, cJSON *item); /* takes item over, also when it cannot be added */
/* The object as indented text and a newline, by phx__text_write; refused when something was lost since begin. */
phx_status phx__json_write(const char *path, const cJSON *root, phx_error *err);
#endif
