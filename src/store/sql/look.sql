-- One part of a look: where a partition stands and what its last id in a day table is. Parts are
-- joined by "union all", all of a node in one statement. Primary keys.
select {partition}::int as partition,
       (select p.day from shardmq.partition p where p.partition = {partition}) as day,
       (select b.base_id + b.count - 1 from shardmq.batch_{partition}_{day} b
         order by b.base_id desc limit 1) as last_id
