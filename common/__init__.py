"""What every command uses: settings, terminal, files, pictures, geometry, processes, devices."""
