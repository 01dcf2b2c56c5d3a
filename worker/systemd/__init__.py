"""Everything that knows D-Bus, units and cgroups; nothing here knows of masters or jobs."""
