/* core/config/config_checks.h - see config_checks.c.  [main] */
#ifndef PHX__CONFIG_CHECKS_H
#define PHX__CONFIG_CHECKS_H
#include "config/config.h"

/* What the core's settings must be together, and with the selected plugins; problems go to the config. */
void phx__config_check_together(phx__config *config);
#endif
