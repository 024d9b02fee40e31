-- The numbers of partitions that are given away.
select partition from shardmq_control.partition order by 1
