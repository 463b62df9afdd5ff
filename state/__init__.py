"""State of a partition: rows in RocksDB, their changelog, and the flush that keeps both exact. No Kafka."""
