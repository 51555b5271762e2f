"""Hardware that veRL does not ship: each folder is a plugin loaded through `VERL_USE_EXTERNAL_MODULES`."""
