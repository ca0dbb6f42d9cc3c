/* core/main.c - the `phalanx` command; everything is in cli.c and the commands. */
#include "cli.h"

int main(int argc, char **argv) { return phx__cli_main(argc, argv); }
