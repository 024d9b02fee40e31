-- The days that partitions stand on, for a producer's first append to them. By the primary key.
-- $1 int[]: partitions
select p.partition, p.day from shardmq.partition p where p.partition = any ($1::int[])
