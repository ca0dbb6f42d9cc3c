/* core/command/plan.c - see plan.h.  Ranks in a row that are alike stand in one line. */
#include "command/plan.h"

#include <inttypes.h>
#include <string.h>

#include "base/bytes_text.h"
#include "base/status.h"
#include "command/memory_room.h"
#include "engine/prepare.h"
#include "plugin/host.h"

typedef struct row {
  int32_t first;
  int64_t bytes[PHX_MEM_KINDS], copies, sent;
} row;

static phx_status row_of(const phx__config *config, int32_t rank, row *out, phx_error *err) {
  const int32_t size = (int32_t)config->s.run.ranks;
  phx__prepared *p = NULL;
  PHX_TRY(phx__prepare(config, rank, size, rank, size, 0, 0, &p, err));
  memset(out, 0, sizeof *out);
  out->first = rank;
  memcpy(out->bytes, p->planned, sizeof out->bytes);
  out->copies = p->copy_bytes;
  for (int op = 0; op < PHX_OPS; op++) out->sent += p->estimate.sent[op];
  phx__prepared_free(p);
  return PHX_OK;
}

static bool same(const row *a, const row *b) {
  return !memcmp(a->bytes, b->bytes, sizeof a->bytes) && a->copies == b->copies && a->sent == b->sent;
}

static void print_row(const row *r, int32_t last, FILE *out) {
  char text[24];
  int64_t total = 0;
  snprintf(text, sizeof text, last > r->first ? "%d to %d" : "%d", r->first, last);
  fprintf(out, ";  %-9s", text);
  for (int k = 0; k < PHX_MEM_KINDS; k++) {
    phx__bytes_text(r->bytes[k], text);
    fprintf(out, " %11s", text);
    total += r->bytes[k];
  }
  phx__bytes_text(total, text);
  fprintf(out, " %11s", text);
  phx__bytes_text(r->copies, text);
  fprintf(out, " %11s", text);
  phx__bytes_text(r->sent, text);
  fprintf(out, " %11s\n", text);
}

static phx_status print_room(const phx__config *config, FILE *out, phx_error *err) {
  phx__room room;
  char text[300];
  phx__room_read("", &room);
  const phx_status status = phx__room_say(config, &room, text, sizeof text, err);
  if (!status && *text) fprintf(out, ";  %s\n", text);
  return status;
}

phx_status phx__plan_print(const phx__config *config, FILE *out, phx_error *err) {
  const int32_t size = (int32_t)config->s.run.ranks;
  row now, before;
  PHX_TRY(row_of(config, 0, &before, err));
  fprintf(out,
          "\n; The plan: memory of each rank, and what it sends in a step.  Copies (of saves in the background) are\n"
          "; part of buffers; the device's own scratch is known when it is open, and comes to workspace then.\n;  %-9s",
          "rank");
  for (int k = 0; k < PHX_MEM_KINDS; k++) fprintf(out, " %11s", phx__memory_name(k));
  fprintf(out, " %11s %11s %11s\n", "total", "(copies)", "sent/step");
  for (int32_t rank = 1; rank < size; rank++) {
    PHX_TRY(row_of(config, rank, &now, err));
    if (same(&now, &before)) continue;
    print_row(&before, rank - 1, out);
    before = now;
  }
  print_row(&before, size - 1, out);
  return print_room(config, out, err);
}
