"""Online: engines that serve a model inside its KL budget, the HTTP server and its metrics."""
