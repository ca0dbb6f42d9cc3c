/* core/command/cli.c - `phalanx COMMAND ...`: which command, and the arguments that several commands share.
 *
 * A mistake on the command line is one line on stderr and exit status 2; nothing was opened by then.  [main] only. */
#include "command/cli.h"
#include "base/complain.h"
#include "base/nearest.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/resume.h"
#include "command/commands.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct command {
  const char *name, *arguments, *summary;
  int (*run)(int argc, char **argv);
  const char *details; /* of its --help, behind the two above; NULL: the command answers by itself */
} command;

#define EVERY_RUN \
  "  -n RANKS                   ranks on this machine (run.ranks)\n" \
  "  --strategy NAME|PATH.so    how weights, gradients and states are spread (run.strategy)\n" \
  "  --set section.key=value    any key of FILE.ini; the last one counts\n"
#define STEPS "  --steps K                  training steps (run.steps)\n"
#define SECTIONS "`phalanx help` lists the sections and plugins, `phalanx help NAME` their keys.\n"

/* One row per command, in the order of --help. */
static const command commands[] = {
    {"train",
     "FILE.ini [-n RANKS] [--strategy NAME|PATH.so] [--set section.key=value]... [--steps K] [--resume [DIR|if-any]]",
     "one run, or (--resume) what is left of it; without another launcher it starts the ranks itself",
     phx__command_train,
     EVERY_RUN STEPS
     "  --resume [DIR]             go on from the newest checkpoint of run.out, or of DIR: a run, or one checkpoint\n"
     "  --resume=if-any            the same of run.out, or a new run where it holds no checkpoint\n"
     "\n" SECTIONS},
    {"compare", "FILE.ini --strategies ddp,fsdp.sharding=grad_op,zero.stage=1,... [-n RANKS] [--steps K] [--set ...]",
     "the same run under several strategies: memory, speed, traffic, loss, equal bits", phx__command_compare,
     "  --strategies A,B.key=v,... what is compared: names, each with options of its own\n" EVERY_RUN STEPS
     "\nExit status 1: the bits differ, or a run did not keep its plan.\n"},
    {"check", "FILE.ini [-n RANKS] [--strategy NAME|PATH.so] [--set section.key=value]...",
     "the effective configuration and where each value came from; no run", phx__command_check, EVERY_RUN "\n" SECTIONS},
    {"plugins", "[FILE.ini]", "plugins found: kind, name, version, ABI, path, and whether they can run here",
     phx__command_plugins,
     "  FILE.ini                   its [plugins] path is searched first\n"
     "\nPHALANX_PLUGIN_PATH adds directories: absolute, colon-separated.\n"},
    {"help", "[NAME|PATH.so] [FILE.ini]",
     "options of a plugin or of one of the core's sections, as a table and a sample", phx__command_help,
     "  FILE.ini                   its [plugins] path is searched first\n"},
    {"data", "tokenize TEXT... -o OUT.bin [--valid FRACTION VALID.bin] [--force]", "token files from text (bytes)",
     phx__command_data, NULL},
    {"sample", "FROM [--prompt TEXT] [--tokens N] [--temperature T] [--top-k K] [--seed S]",
     "text from a model", phx__command_sample,
     "  FROM                       a run, a checkpoint, or a folder with model.safetensors and config.json\n"
     "  --prompt TEXT              what the text begins with\n"
     "  --tokens N                 how many tokens follow\n"
     "  --temperature T            0 takes the likeliest token\n"
     "  --top-k K                  only of the K likeliest; 0 of all\n"
     "  --seed S                   the same seed gives the same text\n"},
    {"checkpoint", "ls FROM | verify FROM | export FROM OUTDIR | import FROM -o CHECKPOINT|RUN | diff A B",
     "what a run saved: a list, a check of every byte, from and to Hugging Face's GPT-2 files, differences",
     phx__command_checkpoint,
     "  FROM, A, B                 a run (the newer of its latest checkpoint and its final weights), a checkpoint, or\n"
     "                             a folder with model.safetensors and config.json\n"
     "  ls FROM                    steps, strategy, ranks, bytes, age\n"
     "  verify FROM                every chunk's checksum, every block once, the state hash; status 4: damaged\n"
     "  export FROM OUTDIR         model.safetensors and config.json as Hugging Face publishes GPT-2\n"
     "  import FROM -o RUN         the other way; `train FILE.ini --resume RUN` goes on from it\n"
     "  diff A B [--weights]       the first tensor that differs; status 1: they differ\n"},
};
enum { COMMANDS = sizeof commands / sizeof commands[0] };

static void print_usage(FILE *out) {
  fprintf(out, "usage: phalanx COMMAND ...\n\n");
  for (int i = 0; i < COMMANDS; i++)
    fprintf(out, "  phalanx %s %s\n      %s\n", commands[i].name, commands[i].arguments, commands[i].summary);
  fprintf(out, "  phalanx --version | --help; phalanx COMMAND --help\n\n"
               "Exit status: 0 done, 2 refused, 3 a rank failed or a file could not be written, 4 a checkpoint or a "
               "file of weights is damaged,\n5 stopped by a signal, with the state saved (run.stopped_status).\n");
}

int phx__cli_unknown(const char *what, const char *word, const char *const *known) {
  char hint[80];
  phx__nearest nearest = {.word = word};
  for (; *known; known++) phx__nearest_offer(&nearest, *known);
  phx__complain("unknown %s '%s'%s", what, word, phx__nearest_hint(&nearest, hint, sizeof hint));
  return PHX__EXIT_REFUSED;
}

/* -h or --help anywhere, but where it is the text to go on from. */
static bool asks_for_help(int argc, char **argv) {
  for (int i = 2; i < argc; i++) {
    const bool value = i > 2 && !strcmp(argv[i - 1], "--prompt");
    if (!value && (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help"))) return true;
  }
  return false;
}

static int print_help(const command *c) {
  printf("usage: phalanx %s%s%s\n\n%s%s%s%s", c->name, *c->arguments ? " " : "", c->arguments, c->summary, "\n",
         *c->details ? "\n" : "", c->details);
  return PHX__EXIT_OK;
}

int phx__cli_main(int argc, char **argv) {
  const char *known[COMMANDS + 3] = {"--version", "--help"};
  if (argc < 2) {
    print_usage(stderr);
    return PHX__EXIT_REFUSED;
  }
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
    print_usage(stdout);
    return PHX__EXIT_OK;
  }
  if (strcmp(argv[1], "--version") == 0) {
    printf("phalanx %s (ABI %d.%d)\n", PHX__VERSION, PHX_ABI_MAJOR, PHX_ABI_MINOR);
    return PHX__EXIT_OK;
  }
  for (int i = 0; i < COMMANDS; i++) {
    if (strcmp(argv[1], commands[i].name) == 0)
      return commands[i].details && asks_for_help(argc, argv) ? print_help(&commands[i])
                                                              : commands[i].run(argc - 1, argv + 1);
    known[i + 2] = commands[i].name;
  }
  return phx__cli_unknown(argv[1][0] == '-' ? "flag" : "command", argv[1], known);
}

/* ---- arguments ---- */
typedef struct flag_row {
  const char *name, *key; /* NULL: the value is section.key=value itself */
  unsigned accept;        /* 0: always */
} flag_row;
static const flag_row flags[] = {{"-n", "run.ranks", 0},
                             {"--strategy", "run.strategy", 0},
                             {"--set", NULL, 0},
                             {"--steps", "run.steps", PHX__ACCEPT_STEPS},
                             {"--strategies", NULL, PHX__ACCEPT_STRATEGIES}};
enum { FLAGS = sizeof flags / sizeof flags[0] };

static bool add_override(phx__arguments *a, const flag_row *flag, const char *value) {
  size_t bytes = strlen(value) + (flag->key ? strlen(flag->key) + 1 : 0) + 1;
  if (a->n_overrides == PHX__OVERRIDES_MOST) {
    phx__complain("more than %d flags", PHX__OVERRIDES_MOST);
    return false;
  }
  char *text = phx__calloc(bytes, 1);
  if (!text) {
    phx__complain("out of memory");
    return false;
  }
  snprintf(text, bytes, "%s%s%s", flag->key ? flag->key : "", flag->key ? "=" : "", value);
  a->texts[a->n_overrides] = text;
  a->overrides[a->n_overrides++] = (phx__override){.text = text, .flag = flag->name};
  return true;
}

static const flag_row *find_flag(const char *word, size_t length, unsigned accept) {
  for (int i = 0; i < FLAGS; i++)
    if (strlen(flags[i].name) == length && strncmp(flags[i].name, word, length) == 0 &&
        (!flags[i].accept || (flags[i].accept & accept)))
      return &flags[i];
  return NULL;
}

static void refuse_flag(const char *word, unsigned accept) {
  const char *known[FLAGS + 2] = {NULL};
  size_t n = 0;
  for (int i = 0; i < FLAGS; i++)
    if (!flags[i].accept || (flags[i].accept & accept)) known[n++] = flags[i].name;
  if (accept & PHX__ACCEPT_RESUME) known[n++] = "--resume";
  phx__cli_unknown("flag", word, known);
}

static bool is_directory(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* --resume [DIR]: the next word is DIR when it is a directory, or when FILE.ini has been given already. */
static int take_resume(char **argv, phx__arguments *out) {
  const char *next = argv[1];
  const bool joined = argv[0][8] == '=';
  const bool taken = !joined && next && next[0] != '-' && next[0] &&
                     (out->file || is_directory(next) || !strcmp(next, PHX__RESUME_IF_ANY));
  if (out->resume && !getenv("PHALANX_RANK")) { /* a restart puts one of its own behind the user's, for its ranks */
    phx__complain("--resume is given twice: one run goes on from one place");
    return 0;
  }
  out->resume = taken ? next : "";
  if (joined) out->resume = argv[0] + 9;
  if (joined && !argv[0][9]) phx__complain("--resume= needs a directory, or " PHX__RESUME_IF_ANY);
  if (joined && !argv[0][9]) return 0;
  return taken ? 2 : 1;
}

/* One argument, or a flag and its value; returns how many were used, 0 when refused. */
static int take(char **argv, unsigned accept, phx__arguments *out) {
  const char *word = argv[0], *value;
  if (word[0] != '-') {
    if (out->file) phx__complain("two files: '%s' and '%s'", out->file, word);
    if (out->file) return 0;
    out->file = word;
    return 1;
  }
  if ((accept & PHX__ACCEPT_RESUME) && strncmp(word, "--resume", 8) == 0 && (!word[8] || word[8] == '='))
    return take_resume(argv, out);
  size_t length = word[1] == '-' ? strcspn(word, "=") : strlen(word);
  const flag_row *flag = find_flag(word, length, accept);
  if (!flag) {
    refuse_flag(word, accept);
    return 0;
  }
  bool joined = word[length] == '=';
  value = joined ? word + length + 1 : argv[1];
  if (!value || !*value) {
    phx__complain("%s needs a value", flag->name);
    return 0;
  }
  if (!joined && !strncmp(value, "--", 2)) {
    phx__complain("%s needs a value, and %s is another flag", flag->name, value);
    return 0;
  }
  if (flag->accept == PHX__ACCEPT_STRATEGIES)
    out->strategies = value;
  else if (!add_override(out, flag, value))
    return 0;
  return joined ? 1 : 2;
}

/* --resume DIR without FILE.ini: the run's own configuration, and its directory where it is now. */
static bool file_of_run(phx__arguments *a) {
  static const flag_row flag = {"--resume", "run.out", 0};
  char run_dir[PHX__CHECKPOINT_PATH];
  phx_error err = PHX_ERROR_INIT;
  int64_t step;
  if (phx__checkpoint_locate(a->resume, run_dir, &step, &err)) {
    phx__complain("%s", err.message);
    return false;
  }
  if (!run_dir[0]) return true; /* of no run: FILE.ini is asked for */
  const size_t bytes = strlen(run_dir) + sizeof "/config.ini";
  a->own_file = phx__calloc(bytes, 1);
  if (!a->own_file || !add_override(a, &flag, run_dir)) return false;
  snprintf(a->own_file, bytes, "%s/config.ini", run_dir);
  a->file = a->own_file;
  const phx__override last = a->overrides[a->n_overrides - 1]; /* first, so that a --set wins */
  memmove(a->overrides + 1, a->overrides, (a->n_overrides - 1) * sizeof *a->overrides);
  a->overrides[0] = last;
  return true;
}

bool phx__arguments_parse(int argc, char **argv, unsigned accept, phx__arguments *out) {
  *out = (phx__arguments){0};
  for (int i = 1; i < argc;) { /* argv[argc] is NULL */
    int used = take(argv + i, accept, out);
    if (!used) goto refused;
    i += used;
  }
  const bool of_run = out->resume && out->resume[0] && strcmp(out->resume, PHX__RESUME_IF_ANY) != 0;
  if (!out->file && of_run && !file_of_run(out)) goto refused;
  if (out->file) return true;
  phx__complain("%s needs a FILE.ini", argv[0]);
refused:
  phx__arguments_free(out);
  return false;
}

void phx__arguments_free(phx__arguments *arguments) {
  for (size_t i = 0; i < arguments->n_overrides; i++) phx__free(arguments->texts[i]);
  phx__free(arguments->own_file);
  *arguments = (phx__arguments){0};
}
