"""The mathematics of RSA. Imports torch and nothing else of this project's dependencies."""
