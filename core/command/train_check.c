/* core/command/train_check.c - see train_check.h. */
#include "command/train_check.h"

#include "base/status.h"
#include "checkpoint/disk_room.h"
#include "command/memory_room.h"
#include "command/run_data.h"
#include "engine/cpus.h"
#include "engine/drift.h"
#include "engine/prepare.h"

phx_status phx__train_check(const phx__config *config, phx_error *err) {
  const int32_t size = (int32_t)config->s.run.ranks;
  phx_status status = PHX_OK;
  phx__room room;
  phx__room_read("", &room);
  for (int32_t rank = 0; rank < size && !status; rank++) {
    phx__prepared *p = NULL;
    phx__run_data data = {NULL, NULL};
    status = phx__prepare(config, rank, size, rank, size, 0, 0, &p, err);
    if (!status && rank == 0) status = phx__run_data_attach(config, p, &data, err);
    if (!status && rank == 0) status = phx__run_data_read(&data, err);
    if (!status && config->s.run.drift_every > 0) status = phx__drift_supported(p, err);
    if (!status && rank == 0) status = phx__room_check(config, &room, err);
    if (!status && rank == 0) status = phx__disk_room_at_start(p, err);
    phx__run_data_close(&data);
    phx__prepared_free(p);
  }
  const int32_t threads = phx__threads(config, size);
  if (!status && config->s.run.pin == 1 && threads * size > phx__cpus_count())
    status = phx_fail(err, PHX_INVALID, "run.pin = yes: %d ranks x %d threads need %d CPUs, and there are %d", size,
                      threads, threads * size, phx__cpus_count());
  return status;
}
