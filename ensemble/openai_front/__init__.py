API_KEY_VARIABLE = "DISTSERVE_API_KEY"  # not a flag of the front's process, which others could read
