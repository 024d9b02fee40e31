-- The open partitions with the day that takes their appends, and how many seconds it is to the first one
-- after that day. Few rows: the whole of partition.
select partition, day,
       ceil(extract(epoch from shardmq.day_start(day) + interval '24 hours' - clock_timestamp()))::bigint
  from shardmq.partition
 where state = 'open'
 order by partition
