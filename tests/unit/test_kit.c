/* The kit: shards and buckets cover every block once, the window planner's programs are played back against what the
 * stages need, views follow "the first writes, the others add", and what is planned is what is allocated. */
#include <criterion/criterion.h>
#include <phalanx/kit.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "loopback.h"
#include "base/status.h"
#include "toy.h"

Test(kit, shards_cover_every_block_once) {
  for (int64_t blocks = 0; blocks < 40; blocks++)
    for (int32_t ranks = 1; ranks <= 9; ranks++) {
      int64_t next = 0;
      for (int32_t r = 0; r < ranks; r++) {
        phx_kit_shard s = phx_kit_shard_of(blocks, r, ranks);
        cr_assert(s.blocks >= 0 && s.blocks <= s.per && s.per * ranks >= blocks && (s.per - 1) * ranks < blocks);
        cr_assert(s.blocks == 0 || s.first == s.per * r);
        cr_assert_eq(s.first, next);
        next += s.blocks;
      }
      cr_assert_eq(next, blocks);
      cr_assert_eq(phx_kit_whole_numel(blocks, ranks), phx_kit_shard_of(blocks, 0, ranks).per * ranks * PHX_BLOCK);
    }
}

Test(kit, parts_cut_a_range_at_unit_borders) {
  toy *t = toy_odd();
  const phx_model *m = &t->model;
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
    for (int64_t first = 0; first < m->total_blocks[flat]; first++)
      for (int64_t blocks = 0; blocks <= m->total_blocks[flat] - first + 3; blocks++) {
        int64_t inside = blocks < m->total_blocks[flat] - first ? blocks : m->total_blocks[flat] - first, at = 0;
        for (phx_kit_part p = {0}; phx_kit_part_next(m, flat, first, blocks, &p);) {
          cr_assert_eq(p.at, at);
          cr_assert(p.blocks > 0);
          cr_assert_eq(m->units[p.unit].first_block[flat] + p.first, first + at);
          cr_assert(p.first + p.blocks <= m->units[p.unit].blocks[flat]);
          at += p.blocks;
        }
        cr_assert_eq(at, inside, "flat %u range %lld + %lld", flat, (long long)first, (long long)blocks);
      }
  toy_free(t);
}

Test(kit, order_and_buckets_follow_backward) {
  toy *t = toy_odd();
  phx_kit_order o;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx_kit_order_create(&t->model, &o, &err), PHX_OK);
  /* head: tail (the tied embedding is completed by stage 0, last), then drop, idle, half, big, one, embed */
  const char *const want[] = {"tail", "drop", "idle", "half", "big", "one", "embed"};
  cr_assert_eq(o.n, 7u);
  for (uint32_t i = 0; i < o.n; i++) cr_assert_str_eq(t->units[o.units[i]].name, want[i]);
  cr_assert_eq(o.numel, t->elements[0]);
  for (int64_t head = 1; head < o.numel + 3000; head = head * 3 + 700)
    for (int64_t each = 1; each < o.numel + 3000; each = each * 2 + 300) {
      phx_kit_bucket *b;
      uint32_t n;
      cr_assert_eq(phx_kit_buckets_create(&t->model, &o, head, each, &b, &n, &err), PHX_OK);
      int64_t at = 0;
      for (uint32_t i = 0; i < n; i++) {
        int64_t limit = i ? each : head;
        cr_assert_eq(b[i].first, at);
        cr_assert(b[i].numel > 0 && b[i].numel < limit + PHX_BLOCK && b[i].numel % PHX_BLOCK == 0);
        cr_assert(i + 1 == n || b[i].numel >= limit);
        at += b[i].numel;
        uint32_t u = o.units[b[i].last]; /* holds the bucket's last element */
        cr_assert(o.offset[u] < at && at <= o.offset[u] + t->units[u].blocks[0] * PHX_BLOCK);
      }
      cr_assert_eq(at, o.numel);
      free(b);
    }
  phx_kit_order_destroy(&o);
  toy_free(t);
}

Test(kit, a_gradient_that_no_stage_writes_is_refused_by_name) {
  toy *t = toy_new();
  uint32_t u = toy_unit(t, "lonely");
  toy_param(t, 3, 5, 0);
  toy_stage(t, "only");
  toy_use(t, u, PHX_USE_FORWARD);
  toy_finish(t);
  phx_kit_order o;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx_kit_order_create(&t->model, &o, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "'lonely'"), "%s", err.message);
  toy_free(t);
}

/* ---- the pool ---- */

static int64_t taken(phx_kit_pool *p, int64_t numel) {
  int64_t at = -1;
  cr_assert_eq(phx_kit_pool_take(p, numel, &at, NULL), PHX_OK);
  return at;
}

Test(kit, a_window_is_at_the_lowest_offset_where_it_fits) {
  phx_kit_pool p = {0};
  cr_assert_eq(taken(&p, 10), 0);
  cr_assert_eq(taken(&p, 20), 10);
  cr_assert_eq(taken(&p, 5), 30);
  phx_kit_pool_give_back(&p, 10);
  cr_assert_eq(taken(&p, 21), 35, "the gap of 20 is too small");
  cr_assert_eq(taken(&p, 12), 10);
  cr_assert_eq(taken(&p, 8), 22, "the rest of the gap, to the last element");
  phx_kit_pool_give_back(&p, 0);
  phx_kit_pool_give_back(&p, 10);
  cr_assert_eq(taken(&p, 22), 0, "two neighbours that were given back are one gap");
  cr_assert_eq(p.numel, 56, "as high as it ever was");
  cr_assert_eq(p.n, 4u);
  phx_kit_pool_destroy(&p);
  cr_assert_eq(p.numel, 0);
}

/* Against a map of single elements. */
Test(kit, a_pool_of_many_windows_is_first_fit) {
  enum { ELEMENTS = 4096, WINDOWS = 60 };
  static uint8_t used[ELEMENTS];
  int64_t offset[WINDOWS], numel[WINDOWS] = {0}, highest = 0;
  phx_kit_pool p = {0};
  for (uint64_t turn = 0; turn < 3000; turn++) {
    uint32_t w = (uint32_t)(toy_mix(turn) % WINDOWS);
    if (numel[w] > 0) {
      phx_kit_pool_give_back(&p, offset[w]);
      memset(used + offset[w], 0, (size_t)numel[w]);
      numel[w] = 0;
      continue;
    }
    int64_t at = 0, free_from = 0;
    numel[w] = 1 + (int64_t)(toy_mix(turn + 5000) % 40);
    for (; at - free_from < numel[w]; at++)
      if (used[at]) free_from = at + 1;
    offset[w] = taken(&p, numel[w]);
    cr_assert_eq(offset[w], free_from);
    memset(used + offset[w], 1, (size_t)numel[w]);
    if (offset[w] + numel[w] > highest) highest = offset[w] + numel[w];
  }
  cr_assert_eq(p.numel, highest);
  cr_assert_gt(p.n, 16u, "more than the pool begins with");
  phx_kit_pool_destroy(&p);
}

/* ---- the window planner, played back ---- */

typedef struct playback {
  const phx_model *m;
  const phx_kit_policy *k;
  int64_t weight[TOY_UNITS], gradient[TOY_UNITS]; /* offset, -1: none */
  bool reduced[TOY_UNITS];
  int64_t high, live_numel;
  int gathers, live, most;
} playback;

static bool needs(const phx_model *m, uint32_t position, uint32_t unit, uint32_t flag) {
  uint32_t s = position < m->n_stages ? position : 2 * m->n_stages - 1 - position;
  const phx_stage *stage = phx_model_stage(m, s);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(m, stage->first_use + i);
    if (use->unit == unit && (use->flags & flag)) return true;
  }
  return false;
}

static void expect_apart(const playback *p) {
  int64_t begin[2 * TOY_UNITS], end[2 * TOY_UNITS];
  int n = 0;
  for (uint32_t u = 0; u < p->m->n_units; u++) {
    if (p->weight[u] >= 0) begin[n] = p->weight[u], end[n++] = p->weight[u] + p->k->weight_numel[u];
    if (p->gradient[u] >= 0) begin[n] = p->gradient[u], end[n++] = p->gradient[u] + p->k->gradient_numel[u];
  }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < i; j++) cr_assert(end[i] <= begin[j] || end[j] <= begin[i], "windows overlap");
}

static void play_action(playback *p, const phx_kit_action *a) {
  switch (a->what) {
    case PHX_KIT_GATHER:
      cr_assert_eq(p->weight[a->unit], -1);
      p->weight[a->unit] = a->offset;
      p->gathers++;
      if (++p->live > p->most) p->most = p->live;
      p->live_numel += p->k->weight_numel[a->unit];
      cr_assert(p->k->evict == PHX_KIT_EVICT_UNWANTED || p->live_numel <= p->k->live_numel);
      if (a->offset + p->k->weight_numel[a->unit] > p->high) p->high = a->offset + p->k->weight_numel[a->unit];
      break;
    case PHX_KIT_OPEN:
      cr_assert_eq(p->gradient[a->unit], -1);
      p->gradient[a->unit] = a->offset;
      if (a->offset + p->k->gradient_numel[a->unit] > p->high) p->high = a->offset + p->k->gradient_numel[a->unit];
      break;
    case PHX_KIT_DROP:
      cr_assert_eq(p->weight[a->unit], a->offset);
      p->weight[a->unit] = -1;
      p->live--;
      p->live_numel -= p->k->weight_numel[a->unit];
      break;
    case PHX_KIT_REDUCE:
      cr_assert_eq(p->gradient[a->unit], a->offset);
      cr_assert(!p->reduced[a->unit]);
      p->reduced[a->unit] = true;
      break;
    case PHX_KIT_CLOSE:
      cr_assert(p->reduced[a->unit]);
      cr_assert_eq(p->gradient[a->unit], a->offset);
      p->gradient[a->unit] = -1;
      break;
    default:
      cr_assert_fail("action %d", a->what);
  }
  expect_apart(p);
}

static playback play_back(const phx_model *m, const phx_kit_policy *k, const phx_kit_program *g) {
  playback p = {.m = m, .k = k};
  for (uint32_t u = 0; u < m->n_units; u++) p.weight[u] = p.gradient[u] = -1;
  for (uint32_t position = 0; position < g->n_positions; position++) {
    bool backward = position >= m->n_stages;
    for (uint32_t i = g->first[2 * position]; i < g->first[2 * position + 1]; i++) play_action(&p, &g->actions[i]);
    for (uint32_t u = 0; u < m->n_units; u++) {
      if (needs(m, position, u, backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD) && k->weight_numel[u] > 0)
        cr_assert(p.weight[u] >= 0, "unit %u is not there at %u", u, position);
      if (backward && k->gradient_numel && k->gradient_numel[u] > 0 && needs(m, position, u, PHX_USE_GRADIENT))
        cr_assert(p.gradient[u] >= 0 && !p.reduced[u]);
    }
    for (uint32_t i = g->first[2 * position + 1]; i < g->first[2 * position + 2]; i++) play_action(&p, &g->actions[i]);
  }
  for (uint32_t u = 0; u < m->n_units; u++) {
    cr_assert(p.weight[u] == -1 && p.gradient[u] == -1);
    cr_assert_eq(p.reduced[u], !k->evaluate && m->units[u].blocks[0] > 0);
  }
  cr_assert_eq(p.high, g->pool_numel, "the pool is as large as its highest window");
  cr_assert_eq(p.most, g->most_units);
  return p;
}

static void sizes(const toy *t, int64_t weight[TOY_UNITS], int64_t gradient[TOY_UNITS]) {
  for (uint32_t u = 0; u < t->model.n_units; u++) {
    gradient[u] = phx_kit_whole_numel(t->units[u].blocks[0], 3);
    weight[u] = gradient[u] + phx_kit_whole_numel(t->units[u].blocks[1], 3);
  }
}

static const phx_kit_policy plain_policy = {.ahead_numel = INT64_MAX, .live_units = INT64_MAX, .live_numel = INT64_MAX};

Test(kit, every_program_plays_back) {
  for (int which = 0; which < 2; which++) {
    toy *t = which ? toy_odd() : toy_plain(9, 40);
    int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
    sizes(t, weight, gradient);
    for (int variant = 0; variant < 2 * 2 * 2 * 6 * 4; variant++) {
      phx_kit_policy k = plain_policy;
      static const int64_t numels[] = {INT64_MAX, 0, 5000, 20000};
      k.weight_numel = weight;
      k.evaluate = variant & 1;
      k.keep = variant >> 1 & 1;
      k.gradient_numel = !k.evaluate && (variant >> 2 & 1) ? gradient : NULL;
      k.ahead_units = (variant >> 3) % 6;
      k.ahead_numel = numels[(variant >> 3) / 6 % 4];
      phx_kit_program g;
      phx_error err = PHX_ERROR_INIT;
      cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
      play_back(&t->model, &k, &g);
      phx_kit_program_destroy(&g);
    }
    toy_free(t);
  }
}

Test(kit, the_pool_holds_what_is_ahead_and_no_more) {
  toy *t = toy_plain(9, 40); /* embed 2 blocks, each layer 2, head 2: 3 blocks of window each at 3 ranks */
  int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
  sizes(t, weight, gradient);
  for (int64_t ahead = 0; ahead < 6; ahead++) {
    phx_kit_policy k = plain_policy;
    phx_kit_program g;
    k.weight_numel = weight;
    k.ahead_units = ahead;
    cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, NULL), PHX_OK);
    playback p = play_back(&t->model, &k, &g);
    cr_assert_eq(g.most_units, ahead + 1);
    cr_assert_eq(g.pool_numel, (ahead + 1) * weight[1]);
    /* forward gathers 11, backward the 10 that it reads, less those still there where the passes touch */
    cr_assert_eq(p.gathers, 11 + 10 - (ahead + 1));
    phx_kit_program_destroy(&g);
    k.gradient_numel = gradient; /* one gradient is written while the one before it is reduced */
    cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, NULL), PHX_OK);
    play_back(&t->model, &k, &g);
    cr_assert_eq(g.pool_numel, (ahead + 3) * weight[1]);
    phx_kit_program_destroy(&g);
  }
  toy_free(t);
}

Test(kit, bounds_on_what_is_gathered) {
  toy *t = toy_plain(9, 40);
  int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
  sizes(t, weight, gradient);
  phx_error err = PHX_ERROR_INIT;
  phx_kit_policy k = plain_policy;
  phx_kit_program g;
  k.weight_numel = weight;
  k.ahead_units = 5;
  for (int64_t most = 1; most < 8; most++) {
    k.live_units = most;
    cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
    play_back(&t->model, &k, &g);
    cr_assert_eq(g.most_units, most < 6 ? most : 6);
    phx_kit_program_destroy(&g);
  }
  k.live_units = INT64_MAX;
  k.live_numel = 4 * weight[1] + 5; /* elements: four units fit, a fifth does not */
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK);
  play_back(&t->model, &k, &g);
  cr_assert_eq(g.most_units, 4);
  phx_kit_program_destroy(&g);
  k.keep = 1;
  k.live_units = 9; /* forward keeps 10 for backward */
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "at most 9 units"), "%s", err.message);
  toy_free(t);
}

/* With the farthest leaving, at every bound from what a stage needs to more than all. */
Test(kit, every_program_of_the_farthest_plays_back) {
  for (int which = 0; which < 2; which++) {
    toy *t = which ? toy_odd() : toy_plain(9, 40);
    int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
    sizes(t, weight, gradient);
    for (int variant = 0; variant < 2 * 2 * 4 * 3 * 8; variant++) {
      static const int64_t numels[] = {INT64_MAX, 0, 5000, 20000}, units[] = {INT64_MAX, 1, 3};
      phx_kit_policy k = plain_policy;
      phx_kit_program g;
      phx_error err = PHX_ERROR_INIT;
      k.weight_numel = weight;
      k.evict = PHX_KIT_EVICT_FARTHEST;
      k.evaluate = variant & 1;
      k.gradient_numel = !k.evaluate && (variant >> 1 & 1) ? gradient : NULL;
      k.ahead_numel = numels[(variant >> 2) % 4];
      k.ahead_units = units[(variant >> 4) % 3];
      cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
      playback all = play_back(&t->model, &k, &g);
      int64_t enough = g.enough_numel, most = 0;
      phx_kit_program_destroy(&g);
      for (uint32_t u = 0; u < t->model.n_units; u++) most += weight[u] > 0;
      cr_assert_leq(all.gathers, most, "without a bound nothing is gathered twice");
      k.live_numel = enough + (variant / 48 - 4) * 3000;
      if (phx_kit_program_create(&t->model, &k, &g, &err) != PHX_OK) {
        cr_assert_lt(k.live_numel, enough, "%s", err.message);
        cr_assert(strstr(err.message, "alone gathers more than"), "%s", err.message);
        continue;
      }
      cr_assert_geq(play_back(&t->model, &k, &g).gathers, all.gathers);
      phx_kit_program_destroy(&g);
    }
    toy_free(t);
  }
}

/* Windows of one size; backward reads all but the embedding: with room for some, so many of the last stages' stay. */
Test(kit, what_fits_stays_from_forward_to_backward) {
  toy *t = toy_plain(9, 40);
  int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
  sizes(t, weight, gradient);
  phx_error err = PHX_ERROR_INIT;
  for (int by_units = 0; by_units < 2; by_units++)
    for (int64_t room = 1; room <= 12; room++) {
      phx_kit_policy k = plain_policy;
      phx_kit_program g;
      k.weight_numel = weight;
      k.evict = PHX_KIT_EVICT_FARTHEST;
      k.ahead_units = 0;
      if (by_units) k.live_units = room;
      if (!by_units) k.live_numel = room * weight[1] + weight[1] - 1;
      cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
      int64_t kept = room < 10 ? room : 10;
      cr_assert_eq(play_back(&t->model, &k, &g).gathers, 11 + 10 - kept, "room for %lld", (long long)room);
      cr_assert_eq(g.pool_numel, kept * weight[1]);
      cr_assert_eq(g.enough_numel, weight[1], "a stage's own");
      phx_kit_program_destroy(&g);
    }
  toy_free(t);
}

/* Room for two, and one unit at both ends: a b c d a, then backward.  b leaves for c, c for d, and then d is over. */
Test(kit, what_is_needed_last_leaves) {
  for (uint32_t tied = 0; tied < 4; tied++) { /* its place among the units */
    int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
    phx_error err = PHX_ERROR_INIT;
    phx_kit_policy k = plain_policy;
    phx_kit_program g;
    toy *t = toy_new();
    for (int u = 0; u < 4; u++) toy_unit(t, "u"), toy_param(t, 30, 40, PHX_PARAM_DECAY);
    for (uint32_t s = 0; s < 5; s++) toy_stage(t, "s"), toy_use(t, (tied + s) % 4, TOY_RW);
    toy_finish(t);
    sizes(t, weight, gradient);
    k.weight_numel = weight;
    k.evict = PHX_KIT_EVICT_FARTHEST;
    k.live_units = 2;
    cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
    cr_assert_eq(play_back(&t->model, &k, &g).gathers, 6, "each once, and c and b for backward");
    phx_kit_program_destroy(&g);
    toy_free(t);
  }
}

Test(kit, the_farthest_makes_room_for_what_is_ahead) {
  toy *t = toy_plain(9, 40);
  int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
  sizes(t, weight, gradient);
  phx_error err = PHX_ERROR_INIT;
  phx_kit_policy k = plain_policy;
  phx_kit_program g;
  k.weight_numel = weight;
  k.evict = PHX_KIT_EVICT_FARTHEST;
  k.ahead_units = INT64_MAX;
  k.ahead_numel = weight[1] + 1; /* one waits, which is less: a second is gathered */
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(g.enough_numel, 3 * weight[1]);
  cr_assert_eq(g.first[1], 3u, "the embedding, and two layers ahead");
  phx_kit_program_destroy(&g);
  k.live_numel = 3 * weight[1];
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_OK, "%s", err.message);
  play_back(&t->model, &k, &g);
  cr_assert_eq(g.most_units, 3);
  phx_kit_program_destroy(&g);
  k.live_numel = weight[1] - 1;
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "stage 'embed' alone gathers more than"), "%s", err.message);
  k.live_numel = INT64_MAX;
  k.keep = 1;
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "kept for backward"), "%s", err.message);
  toy_free(t);
}

Test(kit, a_tied_unit_is_gathered_once_where_its_uses_touch) {
  toy *t = toy_odd();
  int64_t weight[TOY_UNITS], gradient[TOY_UNITS];
  sizes(t, weight, gradient);
  phx_kit_policy k = plain_policy;
  phx_kit_program g;
  k.weight_numel = weight;
  k.gradient_numel = gradient;
  cr_assert_eq(phx_kit_program_create(&t->model, &k, &g, NULL), PHX_OK);
  playback p = play_back(&t->model, &k, &g);
  int embed = 0, opened = -1, reduced = -1;
  for (uint32_t i = 0; i < g.n_actions; i++) {
    if (g.actions[i].unit != 0) continue;
    if (g.actions[i].what == PHX_KIT_GATHER) embed++;
    if (g.actions[i].what == PHX_KIT_OPEN) opened = (int)i;
    if (g.actions[i].what == PHX_KIT_REDUCE) reduced = (int)i;
  }
  cr_assert_eq(embed, 2, "for stage 0, and for the head's two passes; its own backward reads no weights");
  cr_assert(opened >= (int)g.first[2 * 7] && opened < (int)g.first[2 * 7 + 1], "opened by the head's backward");
  cr_assert(reduced >= (int)g.first[2 * 13 + 1], "reduced by stage 0's backward, the last");
  /* 2 for embed; in forward and backward one, big, ice, half, idle, drop; tail once */
  cr_assert_eq(p.gathers, 2 + 2 * 6 + 1);
  phx_kit_program_destroy(&g);
  toy_free(t);
}

/* ---- views ---- */

Test(kit, the_first_use_writes_and_later_ones_add) {
  toy *t = toy_odd();
  phx_kit_views v;
  phx_device *d = loopback_device_create(LOOPBACK_THREADS);
  cr_assert_eq(phx_kit_views_create(&t->model, &v, NULL), PHX_OK);
  float *memory = malloc((size_t)t->elements[0] * sizeof *memory);
  for (uint32_t u = 0; u < t->model.n_units; u++)
    if (t->units[u].blocks[0]) v.places[u].gradient = memory + toy_first(t, u, 0);
  phx_kit_views_begin(&v, true);
  const phx_view *head = phx_kit_view(&v, 6, PHX_PASS_BACKWARD, NULL);
  cr_assert_eq(head->n_params, 4u);
  cr_assert_eq(head->params[0].gradient_mode, PHX_GRAD_WRITE);
  cr_assert_eq(head->params[2].gradient_mode, PHX_GRAD_WRITE); /* the tied embedding */
  cr_assert_eq(phx_kit_view(&v, 0, PHX_PASS_BACKWARD, NULL)->params[0].gradient_mode, PHX_GRAD_ADD);
  cr_assert_null(phx_kit_view(&v, 0, PHX_PASS_FORWARD, NULL)->params[0].gradient);
  const phx_view *half = phx_kit_view(&v, 3, PHX_PASS_BACKWARD, NULL); /* trainable, frozen, trainable */
  cr_assert(half->params[0].gradient && !half->params[1].gradient && half->params[2].gradient);
  phx_kit_views_begin(&v, false); /* the next micro-batch adds */
  cr_assert_eq(phx_kit_view(&v, 6, PHX_PASS_BACKWARD, NULL)->params[2].gradient_mode, PHX_GRAD_ADD);
  phx_kit_views_begin(&v, true);
  cr_assert_eq(phx_kit_view(&v, 6, PHX_PASS_BACKWARD, NULL)->params[2].gradient_mode, PHX_GRAD_WRITE);

  /* An unused stage: what it would have written is zero, what it would have added is nothing. */
  for (int asked = 0; asked < 2; asked++) {
    phx_kit_views_begin(&v, true);
    for (int64_t e = 0; e < t->elements[0]; e++) memory[e] = 7;
    if (asked) phx_kit_view(&v, 6, PHX_PASS_BACKWARD, NULL);
    cr_assert_eq(phx_kit_view_unused(&v, d, 6, NULL, NULL), PHX_OK);
    memory[toy_first(t, 0, 0)] = 7;
    cr_assert_eq(phx_kit_view_unused(&v, d, 0, NULL, NULL), PHX_OK);
    cr_assert_eq(memory[toy_first(t, 0, 0)], 7.0f);
    cr_assert_eq(memory[toy_first(t, 0, 0) + 1], 0.0f);
    cr_assert_eq(memory[t->elements[0] - 1], 0.0f);
    cr_assert_eq(memory[toy_first(t, 1, 0)], 7.0f, "another stage's unit is left alone");
  }
  free(memory);
  phx_kit_views_destroy(&v);
  loopback_device_destroy(d);
  toy_free(t);
}

Test(kit, gaps_are_the_elements_of_no_parameter) {
  toy *t = toy_odd();
  phx_device *d = loopback_device_create(LOOPBACK_THREADS);
  for (uint32_t u = 0; u < t->model.n_units; u++) {
    int64_t n = t->units[u].blocks[0] * PHX_BLOCK;
    float *g = malloc((size_t)n * sizeof *g + 1);
    for (int64_t e = 0; e < n; e++) g[e] = 3;
    cr_assert_eq(phx_kit_zero_gaps(d, &t->model, u, g, NULL, NULL), PHX_OK);
    for (int64_t e = 0; e < n; e++) cr_assert_eq(g[e], t->owner[0][toy_first(t, u, 0) + e] < 0 ? 0.0f : 3.0f);
    free(g);
  }
  loopback_device_destroy(d);
  toy_free(t);
}

/* ---- services and regions ---- */

typedef struct fake {
  phx_device *device;
  phx_comm comm;
  phx_optim optim;
  int64_t bytes[PHX_MEM_KINDS], arena;
  int alive, calls, fail_at;
  const char *missing;
} fake;
static const void *f_extension(void *ctx, const char *id) {
  fake *f = ctx;
  if (f->missing && strcmp(id, f->missing) == 0) return NULL;
  if (strcmp(id, PHX_EXT_DEVICE) == 0) return f->device;
  if (strcmp(id, PHX_EXT_COMM) == 0) return &f->comm;
  return strcmp(id, PHX_EXT_OPTIM) == 0 ? &f->optim : NULL;
}
static phx_status f_alloc(void *ctx, const phx_memory *what, void **out, phx_error *err) {
  fake *f = ctx;
  if (++f->calls == f->fail_at) return phx_fail(err, PHX_NOMEM, "made to fail");
  f->bytes[what->kind] += phx_align_bytes(what->bytes);
  if (what->comm) f->arena += phx_align_bytes(what->bytes);
  f->alive++;
  *out = malloc(1);
  return PHX_OK;
}
static void f_release(void *ctx, void *p) {
  ((fake *)ctx)->alive--;
  free(p);
}

Test(kit, regions_are_planned_as_they_are_allocated) {
  fake f = {.device = loopback_device_create(LOOPBACK_THREADS)};
  phx_host host = {
      .struct_size = sizeof host, .ctx = &f, .alloc = f_alloc, .release = f_release, .extension = f_extension};
  phx_kit_services s = {0};
  phx_error err = PHX_ERROR_INIT;
  static const char *const names[] = {PHX_EXT_DEVICE, PHX_EXT_COMM, PHX_EXT_OPTIM};
  for (int i = 0; i < 3; i++) {
    f.missing = names[i];
    cr_assert_eq(phx_kit_services_open(&host, &s, &err), PHX_UNSUPPORTED);
    cr_assert(strstr(err.message, names[i]), "%s", err.message);
  }
  f.missing = NULL;
  cr_assert_eq(phx_kit_services_open(&host, &s, &err), PHX_OK);

  phx_kit_region table[] = {{.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = 1},
                            {.kind = PHX_MEM_BUFFER, .bytes = 0},
                            {.kind = PHX_MEM_OPTIMIZER, .bytes = 257},
                            {.kind = PHX_MEM_GATHERED, .shared = 1, .bytes = 4096}};
  enum { N = sizeof table / sizeof *table };
  phx_estimate e = {.struct_size = sizeof e};
  phx_kit_regions_estimate(table, N, &e);
  phx_kit_estimate_grain(&e, PHX_GRAIN_ROW);
  cr_assert_eq(e.grain, PHX_GRAIN_ROW);
  for (f.fail_at = 1; f.fail_at <= 3; f.fail_at++, f.calls = 0) {
    cr_assert_eq(phx_kit_regions_alloc(&s, table, N, &err), PHX_NOMEM);
    cr_assert_eq(f.alive, 0);
    for (int i = 0; i < N; i++) cr_assert_null(table[i].at);
  }
  memset(f.bytes, 0, sizeof f.bytes);
  f.arena = 0;
  cr_assert_eq(phx_kit_regions_alloc(&s, table, N, &err), PHX_OK);
  cr_assert_eq(f.alive, 3);
  cr_assert_null(table[1].at);
  cr_assert_arr_eq(f.bytes, e.bytes, sizeof f.bytes);
  cr_assert_eq(f.arena, e.arena_bytes);
  cr_assert_eq(e.arena_bytes, 256 + 4096);
  phx_kit_regions_release(&s, table, N);
  cr_assert_eq(f.alive, 0);
  phx_kit_services_close(&s);
  loopback_device_destroy(f.device);
}

Test(kit, low_precision_is_refused_with_the_key) {
  phx_topology t = {.struct_size = sizeof t, .compute_dtype = PHX_BF16, .reduce_dtype = PHX_F32};
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx_kit_check_topology(&t, &err), PHX_UNSUPPORTED);
  cr_assert(strstr(err.message, "compute = fp32"), "%s", err.message);
  t.compute_dtype = PHX_F32, t.reduce_dtype = PHX_BF16;
  cr_assert_eq(phx_kit_check_topology(&t, &err), PHX_UNSUPPORTED);
  cr_assert(strstr(err.message, "reduce = fp32"), "%s", err.message);
}

Test(kit, precision_is_fp32_or_bf16) {
  phx_topology t = {.struct_size = sizeof t, .compute_dtype = PHX_BF16, .reduce_dtype = PHX_BF16};
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx_kit_check_precision(&t, &err), PHX_OK);
  cr_assert(phx_kit_masters(&t) && phx_kit_weight_bytes(&t) == 2 && phx_kit_wire_bytes(&t, 1024) == 2048);
  t.compute_dtype = t.reduce_dtype = PHX_F32;
  cr_assert_eq(phx_kit_check_precision(&t, &err), PHX_OK);
  cr_assert(!phx_kit_masters(&t) && phx_kit_weight_bytes(&t) == 4 && phx_kit_wire_bytes(&t, 1024) == 0);
  t.compute_dtype = PHX_F64;
  cr_assert_eq(phx_kit_check_precision(&t, &err), PHX_UNSUPPORTED);
  cr_assert(strstr(err.message, "compute has dtype 4"), "%s", err.message);
}

static int seen_kinds[4], seen_dtypes[4], n_seen;
static phx_status see(void *ctx, const phx_slice *slice, phx_error *err) {
  (void)ctx, (void)err;
  seen_kinds[n_seen] = slice->kind, seen_dtypes[n_seen++] = slice->dtype;
  return PHX_OK;
}
static phx_ticket given;
static phx_status take(void *ctx, const phx_ticket *ticket, float scale, phx_error *err) {
  (void)ctx, (void)scale, (void)err;
  given = *ticket;
  return PHX_OK;
}
Test(kit, masters_are_named_before_what_is_derived_and_travel_in_the_ticket) {
  phx_visitor visitor = {.struct_size = sizeof visitor, .slice = see};
  phx_optim optim = {.struct_size = sizeof optim, .n_states = 1, .states = {{"m", PHX_F32, 0}}, .update = take};
  cr_assert_eq(phx_kit_visit(&visitor, &optim, PHX_BF16, 0, PHX_FLAT_TRAINABLE, 0, 1, NULL), PHX_OK);
  cr_assert_eq(n_seen, 3);
  cr_assert(seen_kinds[0] == PHX_STATE_MASTER && seen_dtypes[0] == PHX_F32);
  cr_assert(seen_kinds[1] == PHX_STATE_WEIGHT && seen_dtypes[1] == PHX_BF16);
  cr_assert(seen_kinds[2] == PHX_STATE_OPTIM && seen_dtypes[2] == PHX_F32);
  n_seen = 0;
  cr_assert_eq(phx_kit_visit(&visitor, &optim, PHX_F32, 0, PHX_FLAT_FROZEN, 0, 1, NULL), PHX_OK);
  cr_assert(n_seen == 1 && seen_kinds[0] == PHX_STATE_WEIGHT && seen_dtypes[0] == PHX_F32);
  float master = 1, weight = 2;
  phx_kit_slice slice = {.blocks = 1, .weight = &weight, .master = &master, .weight_dtype = PHX_BF16};
  cr_assert_eq(phx_kit_update(&optim, &slice, 1, NULL, NULL), PHX_OK);
  cr_assert(given.master == &master && given.weight == &weight && given.weight_dtype == PHX_BF16);
  slice.master = NULL;
  cr_assert_eq(phx_kit_update(&optim, &slice, 1, NULL, NULL), PHX_OK);
  cr_assert(!given.master && given.weight == &weight && given.weight_dtype == PHX_F32);
}

Test(kit, the_hash_sees_every_bit) {
  unsigned char data[101];
  for (int i = 0; i < 101; i++) data[i] = (unsigned char)(i * 37);
  for (size_t n = 0; n <= 101; n++) {
    uint64_t h = phx_kit_hash(1, data, n);
    cr_assert_neq(h, phx_kit_hash(2, data, n));
    cr_assert(n == 101 || h != phx_kit_hash(1, data, n + 1));
    for (size_t bit = 0; bit < 8 * n; bit++) {
      data[bit / 8] ^= (unsigned char)(1 << bit % 8);
      cr_assert_neq(h, phx_kit_hash(1, data, n));
      data[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
  }
}
