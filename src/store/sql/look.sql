-- A look: where partitions stand and what the last ids in their day tables are, a row of values for each.
-- In this form its plan is made in a sixth of the time that a union takes. Primary keys.
select l.partition, p.day, l.last_id
  from (values
        ({partition}, (select b.base_id + b.count - 1 from shardmq.batch_{partition}_{day} b
                        order by b.base_id desc limit 1))
       ) l (partition, last_id)
  left join shardmq.partition p on p.partition = l.partition
