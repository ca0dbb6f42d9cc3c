/* core/config/config_checks.c - what settings must be together, as far as it is known before data and model are opened.
 *
 * A check is left out when one of its settings was already complained about.  Nothing is accepted and then ignored: a
 * wish that this version does not honour is refused here with the reason.  [main] only. */
#include "config/config_checks.h"
#include "config/config_store.h"

#include <phalanx/provider.h>
#include <string.h>

typedef struct phx__config_private store;

static const phx__entry *at(const store *p, const char *section, const char *key) {
  return phx__config_setting(p, section, key)->entry;
}

static bool good(const store *p, const char *section, const char *key) {
  return !phx__config_setting(p, section, key)->bad;
}

static void check_batch(store *p, const phx__settings *s) {
  int64_t total = s->run.ranks * s->batch.micro * s->batch.accumulate; /* 64 x 2^20 x 2^20 at most */
  if (!good(p, "run", "ranks") || !good(p, "batch", "micro") || !good(p, "batch", "accumulate")) return;
  if (s->batch.total && s->batch.total != total)
    phx__config_error(p, at(p, "batch", "total"),
                      "[batch] total = %lld, but ranks x micro x accumulate = %lld x %lld x %lld = %lld",
                      (long long)s->batch.total, (long long)s->run.ranks, (long long)s->batch.micro,
                      (long long)s->batch.accumulate, (long long)total);
}

static void check_not_offered(store *p, const phx__settings *s) {
  if (s->run.elastic && s->run.max_restarts == 0 && good(p, "run", "elastic") && good(p, "run", "max_restarts"))
    phx__config_error(p, at(p, "run", "elastic"),
                      "[run] elastic = yes is about restarts, and max_restarts = 0 allows none: set max_restarts");
  if (!*s->run.out && good(p, "run", "out"))
    phx__config_error(p, at(p, "run", "out"), "[run] out is empty: name a directory");
}

enum { FP32 = 0, BF16 = 1, FP16 = 2 };

static bool takes_bf16(const phx__selected *selected) {
  return !selected->plugin || (selected->plugin->descriptor->provides & PHX_CAP_BF16); /* missing: said elsewhere */
}

/* What the device says that bf16 costs here. */
static const char *cost_of_bf16(const phx__config *c) {
  const phx_device_table *table = c->device.plugin ? c->device.plugin->descriptor->table : NULL;
  return table && PHX_HAS(table, phx_device_table, cost) && table->cost ? table->cost(PHX_BF16) : NULL;
}

static void check_precision(store *p, const phx__config *c) {
  static const char *const keys[] = {"compute", "reduce"};
  const int32_t wishes[] = {c->s.precision.compute, c->s.precision.reduce};
  for (int i = 0; i < 2; i++) {
    const phx__entry *asked = at(p, "precision", keys[i]);
    if (wishes[i] == FP16)
      phx__config_error(p, asked,
                        "[precision] %s = fp16: its range ends at 65504 and gradients below 6e-8 vanish, so it needs "
                        "loss scaling, which is not offered; bf16 has fp32's range: use bf16",
                        keys[i]);
    if (wishes[i] == BF16 && !takes_bf16(&c->strategy))
      phx__config_error(p, asked, "[precision] %s = bf16: strategy %s keeps and reduces fp32 only: use fp32", keys[i],
                        c->strategy.plugin->descriptor->id);
  }
  if (wishes[0] == BF16 && !takes_bf16(&c->device))
    phx__config_error(p, at(p, "precision", "compute"),
                      "[precision] compute = bf16: device %s computes in fp32 only: use fp32",
                      c->device.plugin->descriptor->id);
  if (wishes[0] == BF16 && !takes_bf16(&c->model))
    phx__config_error(p, at(p, "precision", "compute"),
                      "[precision] compute = bf16: model %s computes in fp32 only: use fp32",
                      c->model.plugin->descriptor->id);
  if (wishes[0] == BF16 && !takes_bf16(&c->optimizer))
    phx__config_error(p, at(p, "precision", "compute"),
                      "[precision] compute = bf16: optimizer %s updates fp32 weights only: use fp32",
                      c->optimizer.plugin->descriptor->id);
  const char *cost = wishes[0] == BF16 && takes_bf16(&c->device) ? cost_of_bf16(c) : NULL;
  if (cost) phx__config_warn(p, at(p, "precision", "compute"), "[precision] compute = bf16: %s", cost);
  if (wishes[1] == BF16)
    phx__config_warn(p, at(p, "precision", "reduce"),
                     "[precision] reduce = bf16: each rank's gradients are rounded to bf16 before they are summed, and "
                     "the sum once more: half the traffic, other numbers than with fp32");
}

/* Only strategies and optimizers decide in which parts numbers are added up. */
static void check_deterministic(store *p, const phx__settings *s, const phx_plugin *d, const char *promise) {
  const phx__entry *asked = at(p, "run", "deterministic");
  const char *kind = phx__kind_name(d->kind);
  if (!s->run.deterministic || (d->provides & PHX_CAP_DETERMINISTIC)) return;
  if (asked)
    phx__config_error(p, asked, "%s %s does not promise %s: [run] deterministic must be no", kind, d->id, promise);
  else
    phx__config_warn(p, NULL, "%s %s does not promise %s ([run] deterministic is yes)", kind, d->id, promise);
}

static void check_strategy(store *p, const phx__settings *s, const phx_plugin *strategy) {
  if ((strategy->needs & PHX_NEED_TWO_RANKS) && s->run.ranks < 2 && good(p, "run", "ranks"))
    phx__config_error(p, at(p, "run", "ranks"), "strategy %s needs at least two ranks: [run] ranks = %lld",
                      strategy->id, (long long)s->run.ranks);
  if (s->run.elastic && ((const phx_strategy_table *)strategy->table)->layout && good(p, "run", "elastic"))
    phx__config_error(p, at(p, "run", "elastic"),
                      "[run] elastic = yes: strategy %s decides itself who computes what, and cannot lose a rank: use "
                      "no",
                      strategy->id);
  check_deterministic(p, s, strategy, "the same bits as others");
}

static void check_pins(store *p, const phx__settings *s) {
  const phx__entry *entry = at(p, "plugins", "pin");
  bool whole = true;
  for (const char *pin = s->plugins.pin + strspn(s->plugins.pin, ", "); *pin;) {
    const size_t n = strcspn(pin, ", ");
    const bool sum = n == 64 && strspn(pin, "0123456789abcdefABCDEF") >= n;
    whole = whole && sum;
    if (!sum)
      phx__config_error(p, entry, "[plugins] pin: '%.*s' is no SHA-256 sum, which has 64 hexadecimal digits",
                        n > 80 ? 80 : (int)n, pin);
    pin += n;
    pin += strspn(pin, ", ");
  }
  const bool by_path = strchr(s->run.strategy, '/') || strchr(s->optimizer.name, '/');
  if (whole && s->plugins.pin[0] && !s->plugins.path[0] && !by_path)
    phx__config_warn(p, entry,
                     "[plugins] pin guards nothing: there is neither a [plugins] path nor a strategy's path, nor an "
                     "optimizer's");
}

void phx__config_check_together(phx__config *config) {
  store *p = config->priv;
  check_pins(p, &config->s);
  check_batch(p, &config->s);
  check_not_offered(p, &config->s);
  check_precision(p, config);
  if (config->strategy.plugin) check_strategy(p, &config->s, config->strategy.plugin->descriptor);
  if (config->optimizer.plugin)
    check_deterministic(p, &config->s, config->optimizer.plugin->descriptor, "the same bits under every strategy");
}
