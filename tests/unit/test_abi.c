/* The ABI's promises that a compiler can check: no public struct has tail padding, and no field of a struct that
 * strategies are compiled against ever moves.  An offset changes here only together with the entry symbol's version;
 * an appended field gets a line of its own, and NO_TAIL names it. */
#include <criterion/criterion.h>
#include <stddef.h>
#include <string.h>
#include <phalanx/provider.h>
#include "plugin/descriptor.h"
#include "plugin/loader.h"
#include "base/status.h"

#define NO_TAIL(type, last)                                                                       \
  _Static_assert(sizeof(struct type) == offsetof(struct type, last) + sizeof(((struct type *)0)->last), \
                 #type " has tail padding behind " #last)
#define PIN(type, field, offset) \
  _Static_assert(offsetof(struct type, field) == (offset), #type "." #field " has moved")

_Static_assert(sizeof(void *) == 8 && sizeof(size_t) == 8, "offsets are pinned for 64-bit machines");
_Static_assert(PHX_ABI_MAJOR == 1, "a new major version has a new entry symbol and new pins");

/* ---- phalanx/base.h ---- */
NO_TAIL(phx_error, message);
PIN(phx_error, struct_size, 0); PIN(phx_error, code, 8); PIN(phx_error, cause, 12); PIN(phx_error, message, 16);

/* ---- phalanx/option.h ---- */
NO_TAIL(phx_option, size);
PIN(phx_option, name, 0); PIN(phx_option, doc, 8); PIN(phx_option, dflt, 16); PIN(phx_option, unit, 24);
PIN(phx_option, choices, 32); PIN(phx_option, imin, 40); PIN(phx_option, imax, 48); PIN(phx_option, rmin, 56);
PIN(phx_option, rmax, 64); PIN(phx_option, type, 72); PIN(phx_option, flags, 76); PIN(phx_option, offset, 80);
PIN(phx_option, size, 84);

/* ---- phalanx/plugin.h ---- */
NO_TAIL(phx_plugin, device);
PIN(phx_plugin, struct_size, 0); PIN(phx_plugin, kind, 8); PIN(phx_plugin, table_major, 12);
PIN(phx_plugin, table_minor, 16); PIN(phx_plugin, reserved0, 20); PIN(phx_plugin, id, 24);
PIN(phx_plugin, version, 32); PIN(phx_plugin, summary, 40); PIN(phx_plugin, vendor, 48); PIN(phx_plugin, license, 56);
PIN(phx_plugin, build, 64); PIN(phx_plugin, provides, 72); PIN(phx_plugin, needs, 80);
PIN(phx_plugin, extensions, 88); PIN(phx_plugin, options, 96); PIN(phx_plugin, n_options, 104);
PIN(phx_plugin, option_stride, 108); PIN(phx_plugin, config_size, 112); PIN(phx_plugin, table, 120);
PIN(phx_plugin, preference, 128); PIN(phx_plugin, reserved1, 132); PIN(phx_plugin, device, 136);

/* ---- phalanx/model.h ---- */
NO_TAIL(phx_param, reserved0);
PIN(phx_param, name, 0); PIN(phx_param, shape, 8); PIN(phx_param, ndim, 72); PIN(phx_param, flags, 76);
PIN(phx_param, unit, 80); PIN(phx_param, init, 84); PIN(phx_param, init_std, 88); PIN(phx_param, numel, 96);
PIN(phx_param, offset, 104); PIN(phx_param, role, 112); PIN(phx_param, row_parts, 116);
PIN(phx_param, column_parts, 120); PIN(phx_param, reserved0, 124);
NO_TAIL(phx_unit, first_block);
PIN(phx_unit, name, 0); PIN(phx_unit, first_param, 8); PIN(phx_unit, n_params, 12); PIN(phx_unit, blocks, 16);
PIN(phx_unit, first_block, 32);
NO_TAIL(phx_use, flags);
PIN(phx_use, unit, 0); PIN(phx_use, flags, 4);
NO_TAIL(phx_stage, n_uses);
PIN(phx_stage, name, 0); PIN(phx_stage, first_use, 8); PIN(phx_stage, n_uses, 12);
NO_TAIL(phx_model, total_blocks);
PIN(phx_model, struct_size, 0); PIN(phx_model, params, 8); PIN(phx_model, units, 16); PIN(phx_model, stages, 24);
PIN(phx_model, uses, 32); PIN(phx_model, n_params, 40); PIN(phx_model, n_units, 44); PIN(phx_model, n_stages, 48);
PIN(phx_model, n_uses, 52); PIN(phx_model, param_stride, 56); PIN(phx_model, unit_stride, 60);
PIN(phx_model, stage_stride, 64); PIN(phx_model, use_stride, 68); PIN(phx_model, total_blocks, 72);

/* ---- phalanx/comm.h ---- */
NO_TAIL(phx_comm_stats, wait_ns);
PIN(phx_comm_stats, struct_size, 0); PIN(phx_comm_stats, calls, 8); PIN(phx_comm_stats, bytes, 264);
PIN(phx_comm_stats, wait_ns, 520);
NO_TAIL(phx_comm, abort);
PIN(phx_comm, struct_size, 0); PIN(phx_comm, ctx, 8); PIN(phx_comm, rank, 16); PIN(phx_comm, size, 20);
PIN(phx_comm, all_reduce, 24); PIN(phx_comm, reduce, 32); PIN(phx_comm, reduce_scatter, 40);
PIN(phx_comm, all_gather, 48); PIN(phx_comm, broadcast, 56); PIN(phx_comm, send, 64); PIN(phx_comm, recv, 72);
PIN(phx_comm, all_to_all, 80); PIN(phx_comm, barrier, 88); PIN(phx_comm, split, 96); PIN(phx_comm, destroy, 104);
PIN(phx_comm, annotate, 112); PIN(phx_comm, stats, 120); PIN(phx_comm, health, 128); PIN(phx_comm, abort, 136);

/* ---- phalanx/device.h ---- */
NO_TAIL(phx_device, unpin);
PIN(phx_device, struct_size, 0); PIN(phx_device, ctx, 8); PIN(phx_device, name, 16); PIN(phx_device, caps, 24);
PIN(phx_device, threads, 28); PIN(phx_device, stream_create, 32); PIN(phx_device, stream_destroy, 40);
PIN(phx_device, stream_synchronize, 48); PIN(phx_device, event_create, 56); PIN(phx_device, event_destroy, 64);
PIN(phx_device, event_record, 72); PIN(phx_device, stream_wait, 80); PIN(phx_device, event_synchronize, 88);
PIN(phx_device, event_done, 96); PIN(phx_device, enqueue, 104); PIN(phx_device, native_stream, 112);
PIN(phx_device, copy, 120); PIN(phx_device, zero, 128); PIN(phx_device, cast, 136); PIN(phx_device, add, 144);
PIN(phx_device, scale, 152); PIN(phx_device, space, 160); PIN(phx_device, pin, 168); PIN(phx_device, unpin, 176);

/* ---- phalanx/host.h ---- */
NO_TAIL(phx_memory, comm);
PIN(phx_memory, struct_size, 0); PIN(phx_memory, bytes, 8); PIN(phx_memory, kind, 16); PIN(phx_memory, space, 20);
PIN(phx_memory, stream, 24); PIN(phx_memory, comm, 32);
NO_TAIL(phx_host, reserved0);
PIN(phx_host, struct_size, 0); PIN(phx_host, abi_major, 8); PIN(phx_host, abi_minor, 12); PIN(phx_host, ctx, 16);
PIN(phx_host, rank, 24); PIN(phx_host, world_size, 28); PIN(phx_host, local_rank, 32); PIN(phx_host, local_size, 36);
PIN(phx_host, log, 40); PIN(phx_host, alloc, 48); PIN(phx_host, release, 56); PIN(phx_host, extension, 64);
PIN(phx_host, metric, 72); PIN(phx_host, deterministic, 80);

/* ---- phalanx/optim.h ---- */
NO_TAIL(phx_optim_state, per);
PIN(phx_optim_state, name, 0); PIN(phx_optim_state, dtype, 8); PIN(phx_optim_state, per, 12);
NO_TAIL(phx_ticket, stream);
PIN(phx_ticket, struct_size, 0); PIN(phx_ticket, unit, 8); PIN(phx_ticket, place, 12); PIN(phx_ticket, first, 16);
PIN(phx_ticket, numel, 24); PIN(phx_ticket, weight, 32); PIN(phx_ticket, master, 40); PIN(phx_ticket, gradient, 48);
PIN(phx_ticket, states, 56); PIN(phx_ticket, weight_dtype, 120); PIN(phx_ticket, gradient_dtype, 124);
PIN(phx_ticket, stream, 128);
NO_TAIL(phx_optim, update);
PIN(phx_optim, struct_size, 0); PIN(phx_optim, ctx, 8); PIN(phx_optim, name, 16); PIN(phx_optim, grain, 24);
PIN(phx_optim, n_states, 28); PIN(phx_optim, states, 32); PIN(phx_optim, update, 160);

/* ---- phalanx/strategy.h ---- */
NO_TAIL(phx_topology, reserved0);
PIN(phx_topology, struct_size, 0); PIN(phx_topology, rank, 8); PIN(phx_topology, world_size, 12);
PIN(phx_topology, local_rank, 16); PIN(phx_topology, local_size, 20); PIN(phx_topology, accumulate, 24);
PIN(phx_topology, reduce, 28); PIN(phx_topology, compute_dtype, 32); PIN(phx_topology, reduce_dtype, 36);
PIN(phx_topology, overlaps, 40); PIN(phx_topology, n_optim_states, 44); PIN(phx_topology, optim_dtype, 48);
PIN(phx_topology, payload, 80); PIN(phx_topology, boundary_bytes, 88); PIN(phx_topology, payload_ctx, 96);
PIN(phx_topology, optim_per, 104); PIN(phx_topology, optim_grain, 136); PIN(phx_topology, reserved0, 140);
NO_TAIL(phx_axis, index);
PIN(phx_axis, name, 0); PIN(phx_axis, size, 24); PIN(phx_axis, index, 28);
NO_TAIL(phx_layout, gradient_terms);
PIN(phx_layout, struct_size, 0); PIN(phx_layout, data_rank, 8); PIN(phx_layout, data_size, 12);
PIN(phx_layout, activation_slots, 16); PIN(phx_layout, n_axes, 20); PIN(phx_layout, axes, 24);
PIN(phx_layout, stage_owned, 280); PIN(phx_layout, unit_owned, 288); PIN(phx_layout, flags, 296);
PIN(phx_layout, gradient_terms, 304);
NO_TAIL(phx_estimate, reserved0);
PIN(phx_estimate, struct_size, 0); PIN(phx_estimate, bytes, 8); PIN(phx_estimate, arena_bytes, 136);
PIN(phx_estimate, sent, 144); PIN(phx_estimate, calls, 400);
PIN(phx_estimate, state_bytes, 656); PIN(phx_estimate, period, 664);
PIN(phx_estimate, grain, 672); PIN(phx_estimate, reserved0, 676);
NO_TAIL(phx_slice, numel);
PIN(phx_slice, struct_size, 0); PIN(phx_slice, kind, 8); PIN(phx_slice, state_index, 12); PIN(phx_slice, name, 16);
PIN(phx_slice, unit, 24); PIN(phx_slice, flat, 28); PIN(phx_slice, first_block, 32); PIN(phx_slice, blocks, 40);
PIN(phx_slice, dtype, 48); PIN(phx_slice, place, 52); PIN(phx_slice, where, 56); PIN(phx_slice, numel, 64);
NO_TAIL(phx_restored, privates);
PIN(phx_restored, struct_size, 0); PIN(phx_restored, what, 8); PIN(phx_restored, world_size, 12);
PIN(phx_restored, step, 16); PIN(phx_restored, privates, 24);
NO_TAIL(phx_visitor, slice);
PIN(phx_visitor, struct_size, 0); PIN(phx_visitor, ctx, 8); PIN(phx_visitor, slice, 16);
NO_TAIL(phx_param_view, param);
PIN(phx_param_view, weight, 0); PIN(phx_param_view, gradient, 8); PIN(phx_param_view, weight_dtype, 16);
PIN(phx_param_view, gradient_dtype, 20); PIN(phx_param_view, gradient_mode, 24); PIN(phx_param_view, param, 28);
NO_TAIL(phx_view, ready);
PIN(phx_view, struct_size, 0); PIN(phx_view, params, 8); PIN(phx_view, n_params, 16); PIN(phx_view, param_stride, 20);
PIN(phx_view, ready, 24);
NO_TAIL(phx_accumulator, add);
PIN(phx_accumulator, struct_size, 0); PIN(phx_accumulator, ctx, 8); PIN(phx_accumulator, add, 16);
NO_TAIL(phx_executor, runs);
PIN(phx_executor, struct_size, 0); PIN(phx_executor, ctx, 8); PIN(phx_executor, micro_batches, 16);
PIN(phx_executor, n_stages, 20); PIN(phx_executor, boundary_bytes, 24); PIN(phx_executor, boundary, 32);
PIN(phx_executor, forward, 40); PIN(phx_executor, backward, 48); PIN(phx_executor, runs, 56);
NO_TAIL(phx_strategy_table, state_restored);
PIN(phx_strategy_table, struct_size, 0); PIN(phx_strategy_table, layout, 8); PIN(phx_strategy_table, estimate, 16);
PIN(phx_strategy_table, create, 24); PIN(phx_strategy_table, destroy, 32); PIN(phx_strategy_table, visit_state, 40);
PIN(phx_strategy_table, map, 48); PIN(phx_strategy_table, unmap, 56); PIN(phx_strategy_table, state_changed, 64);
PIN(phx_strategy_table, begin_micro_batch, 72); PIN(phx_strategy_table, acquire, 80);
PIN(phx_strategy_table, release, 88); PIN(phx_strategy_table, finish_gradients, 96);
PIN(phx_strategy_table, discard_gradients, 104); PIN(phx_strategy_table, gradient_norm, 112);
PIN(phx_strategy_table, update, 120); PIN(phx_strategy_table, run_step, 128);
PIN(phx_strategy_table, prepare_state, 136); PIN(phx_strategy_table, state_restored, 144);

/* ---- phalanx/job.h: provisional, only without tail padding ---- */
NO_TAIL(phx_flight, unit);
NO_TAIL(phx_liveness, plugins);
NO_TAIL(phx_job, exchange);

/* ---- phalanx/provider.h: provisional, only without tail padding ---- */
NO_TAIL(phx_ops, mean);
NO_TAIL(phx_device_table, cost);
NO_TAIL(phx_comm_table, arena);
NO_TAIL(phx_batch_shape, reserved0);
NO_TAIL(phx_stage_memory, workspace);
NO_TAIL(phx_model_facts, computes);
NO_TAIL(phx_stage_call, stream);
NO_TAIL(phx_model_table, backward);

/* ---- phalanx/provider.h, optimizers: those to come are to need no change ---- */
NO_TAIL(phx_optimizer_facts, states);
PIN(phx_optimizer_facts, struct_size, 0); PIN(phx_optimizer_facts, grain, 8); PIN(phx_optimizer_facts, n_states, 12);
PIN(phx_optimizer_facts, states, 16);
NO_TAIL(phx_piece, stream);
PIN(phx_piece, struct_size, 0); PIN(phx_piece, param, 8); PIN(phx_piece, place, 12); PIN(phx_piece, first, 16);
PIN(phx_piece, numel, 24); PIN(phx_piece, weight, 32); PIN(phx_piece, low, 40); PIN(phx_piece, gradient, 48);
PIN(phx_piece, states, 56); PIN(phx_piece, low_dtype, 120); PIN(phx_piece, scale, 124); PIN(phx_piece, lr, 128);
PIN(phx_piece, decay, 136); PIN(phx_piece, step, 144); PIN(phx_piece, stream, 152);
NO_TAIL(phx_optimizer_table, update);
PIN(phx_optimizer_table, struct_size, 0); PIN(phx_optimizer_table, describe, 8);
PIN(phx_optimizer_table, workspace, 16); PIN(phx_optimizer_table, create, 24); PIN(phx_optimizer_table, destroy, 32);
PIN(phx_optimizer_table, update, 40);

/* ---- growth ---- */
static const phx__plugin *open_stub(const char *name) {
  const phx__plugin *plugin = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__loader_open(PHX_TEST_ONLY_PLUGINS "/stubs", PHX_KIND_STRATEGY, name, &plugin, &err), PHX_OK, "%s",
               err.message);
  return plugin;
}

/* Its table ends before run_step, with poison behind: the missing calls read as absent. */
Test(abi, old_plugin_under_this_core) {
  const phx_strategy_table *table = open_stub("old")->descriptor->table;
  cr_assert_lt(table->struct_size, sizeof *table);
  cr_assert_eq(((const unsigned char *)table)[offsetof(phx_strategy_table, run_step)], 0xA5);
  cr_assert_null((void *)PHX__OPTIONAL(table, phx_strategy_table, run_step));
  cr_assert_null((void *)PHX__OPTIONAL(table, phx_strategy_table, prepare_state));
  cr_assert_null((void *)PHX__OPTIONAL(table, phx_strategy_table, state_restored));
  cr_assert_null((void *)PHX__OPTIONAL(table, phx_strategy_table, layout));
  cr_assert_not_null((void *)PHX__OPTIONAL(table, phx_strategy_table, update));
}

/* Descriptor, option rows and table are longer than ours, the tails poisoned. */
Test(abi, new_plugin_under_this_core) {
  const phx_plugin *d = open_stub("new")->descriptor;
  const phx_strategy_table *table = d->table;
  cr_assert_gt(d->struct_size, sizeof *d);
  cr_assert_gt(d->option_stride, sizeof(phx_option));
  cr_assert_gt(table->struct_size, sizeof *table);
  cr_assert_not_null((void *)PHX__OPTIONAL(table, phx_strategy_table, update));
  cr_assert_null((void *)PHX__OPTIONAL(table, phx_strategy_table, run_step));
}

/* PHX_HAS at the border: one byte less than the whole field is a missing field. */
Test(abi, has_is_exact) {
  size_t end = offsetof(phx_strategy_table, run_step) + sizeof(void (*)(void));
  phx_strategy_table table = {.struct_size = end};
  cr_assert(PHX_HAS(&table, phx_strategy_table, run_step));
  table.struct_size = end - 1;
  cr_assert_not(PHX_HAS(&table, phx_strategy_table, run_step));
}
