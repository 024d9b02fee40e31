-- How many partitions each node has, for spreading new ones evenly.
select partition / 100 % 100, count(*) from shardmq_control.partition group by 1
