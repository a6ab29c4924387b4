"""Where trials run; `local` needs nothing but this machine."""
