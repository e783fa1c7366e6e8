"""What a model costs on a device: jobs, workers, reports. Empty until `vlmedge bench` comes."""
